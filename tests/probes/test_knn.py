"""The vote against a slow definition of it, and against scikit-learn's classifier with the same weights."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from patchmill.probes import knn
from patchmill.probes.splits import Split, make_split


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def slow(vectors, labels, split, ks, temperature):
    """Per test tile and k: the weight of each class, by the words of the protocol."""
    votes = {k: [] for k in ks}
    for i in np.flatnonzero(split.test):
        others = [j for j in np.flatnonzero(split.train) if split.fold[j] != split.fold[i]]
        ranked = sorted((float(np.dot(vectors[i].astype(float), vectors[j].astype(float))), j) for j in others)[::-1]
        best = ranked[: max(ks)]
        total = sum(math.exp(similarity / temperature) for similarity, _ in best)
        for k in ks:
            weight = [0.0] * (max(labels) + 1)
            for similarity, j in best[:k]:
                weight[labels[j]] += math.exp(similarity / temperature) / total
            votes[k].append(weight)
    return {k: np.array(v) for k, v in votes.items()}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(8, 40), st.integers(2, 5), st.integers(2, 4), st.sampled_from([0.01, 0.07, 1.0])
)
def test_vote_equals_its_definition(seed, n, groups, classes, temperature):
    random = np.random.default_rng(seed)
    vectors = unit(random.standard_normal((n, 6)))
    labels = np.append(random.integers(0, classes, n - 1), classes - 1)
    split = make_split([None] * n, [f"g{i % groups}" for i in range(n)], [str(i) for i in range(n)])
    ks = [1, max(1, split.smallest // 2), split.smallest]
    similarity, row = knn.nearest(vectors, split, max(ks))
    fast = knn.vote(similarity, labels[row], classes, ks, temperature)
    for k, expected in slow(vectors, labels.tolist(), split, ks, temperature).items():
        np.testing.assert_allclose(fast[k], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 12, 64 << 20])
def test_chunks_change_nothing(monkeypatch, chunk):
    random = np.random.default_rng(1)
    vectors = unit(random.standard_normal((200, 16)))
    split = make_split([None] * 200, [f"g{i % 7}" for i in range(200)], [str(i) for i in range(200)])
    whole = knn.nearest(vectors, split, 20)
    monkeypatch.setattr(knn, "_CHUNK_BYTES", chunk)
    part = knn.nearest(vectors, split, 20)
    np.testing.assert_array_equal(part[1], whole[1])
    np.testing.assert_allclose(part[0], whole[0], atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 17])
def test_train_and_test_equal_scikit_learn(k):
    random = np.random.default_rng(2)
    vectors = unit(random.standard_normal((120, 8)))
    labels = random.integers(0, 3, 120)
    sides = ["train" if i % 3 else "test" for i in range(120)]
    split = make_split(sides, ["g"] * 120, ["s"] * 120)
    similarity, row = knn.nearest(vectors, split, 17)
    answer = knn.shares(knn.vote(similarity, labels[row], 3, [k], 0.07)[k])
    oracle = KNeighborsClassifier(
        k, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine", algorithm="brute"
    ).fit(vectors[split.train], labels[split.train])
    np.testing.assert_allclose(answer, oracle.predict_proba(vectors[split.test]), atol=1e-4)


def test_a_tile_is_never_judged_by_its_own_group():
    vectors = unit(np.repeat(np.eye(4), 3, axis=0) + 1e-3)
    split = make_split([None] * 12, [f"g{i // 3}" for i in range(12)], [str(i) for i in range(12)])
    _, row = knn.nearest(vectors, split, split.smallest)
    assert split.smallest == 9
    assert not (split.fold[row] == split.fold[:, None]).any()


def test_one_group_leaves_one_tile_out_and_says_that_neighbours_leak():
    split = make_split([None] * 5, ["a"] * 5, ["s"] * 5)
    assert split.smallest == 4
    assert "leak" in split.notes[0]
    _, row = knn.nearest(unit(np.eye(5) + 0.1), split, 4)
    assert all(i not in row[i] for i in range(5))


def test_groups_on_both_sides_are_told():
    split = make_split(["train", "train", "test"], ["a", "b", "a"], ["s", "t", "s"])
    assert split.smallest == 2
    assert split.notes[0].startswith("1 group is in train and in test")
    assert make_split(["train", "test"], ["a", "b"], ["s", "t"]).notes == ()
    by_groups = make_split(["train", "test", "test"], ["a", "b", "c"], ["s", "s", "t"])
    assert by_groups.notes[0].startswith("1 source or patient is in train and in test, by groups of its own")


def test_groups_that_share_a_source_are_told():
    split = make_split([None] * 3, ["a", "b", "c"], ["s", "s", "t"])
    assert split.notes[0].startswith("2 groups hold tiles of one and the same source")


def test_smallest_counts_only_folds_that_are_tested():
    fold = np.array([0, 0, 0, 1, 2])
    split = Split(
        rule="", train=np.array([1, 1, 1, 1, 0], bool), test=np.array([0, 0, 0, 1, 1], bool), fold=fold, notes=()
    )
    assert split.smallest == 3
