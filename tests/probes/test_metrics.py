"""Metrics against plain definitions of them."""

import itertools

import numpy as np
import pytest

from patchmill.probes.metrics import measure


def shares(random, n, classes):
    raw = random.random((n, classes))
    return raw / raw.sum(axis=1, keepdims=True)


def slow_auroc(positive, score):
    """The chance that a positive is ranked above a negative, ties count half."""
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(score[positive], score[~positive])]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_metrics_equal_their_definitions(classes):
    random = np.random.default_rng(classes)
    truth = np.concatenate([np.arange(classes), random.integers(0, classes, 60)])
    share = np.round(shares(random, len(truth), classes), 2)
    share[:, -1] = 1 - share[:, :-1].sum(axis=1)
    majority = np.zeros(len(truth), np.int64)
    found = measure(truth, share, majority)
    answer = share.argmax(axis=1)
    table = [[int(((truth == a) & (answer == b)).sum()) for b in range(classes)] for a in range(classes)]
    assert [list(line) for line in found.confusion] == table
    assert found.accuracy.value == pytest.approx(sum(table[c][c] for c in range(classes)) / len(truth))
    recalls = [table[c][c] / sum(table[c]) for c in range(classes)]
    assert found.balanced_accuracy.value == pytest.approx(sum(recalls) / classes)
    ranked = [slow_auroc(truth == c, share[:, c]) for c in range(classes)]
    assert found.auroc.value == pytest.approx(ranked[1] if classes == 2 else sum(ranked) / classes)
    assert found.accuracy.baseline == pytest.approx((truth == 0).mean())
    assert found.balanced_accuracy.baseline == pytest.approx(1 / classes)
    assert found.auroc.baseline == 0.5


@pytest.mark.parametrize(("classes", "truth"), [(2, [1, 1, 1]), (3, [0, 1, 1])])
def test_auroc_without_a_class_is_null_with_its_reason(classes, truth):
    found = measure(np.array(truth), shares(np.random.default_rng(0), 3, classes), np.zeros(3, np.int64))
    assert found.auroc.value is None
    assert found.auroc.reason == f"1 of {classes} classes are not in the test set"
    assert found.accuracy.value is not None
    assert found.balanced_accuracy.value is not None
