"""Accuracy, balanced accuracy and AUROC by scikit-learn's own definitions, beside what a constant answer reaches."""

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

__all__ = ["Figure", "Metrics", "measure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure and what it is worth."""

    value: float | None
    baseline: float | None  # of always answering the most frequent training class; 0.5 for AUROC
    reason: str | None = None  # why there is no value


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """How good predicted labels are."""

    accuracy: Figure
    balanced_accuracy: Figure  # mean recall of the classes that occur in the test set
    auroc: Figure  # two classes: of the second; more: macro mean of one against the rest
    confusion: tuple[tuple[int, ...], ...]  # [true class][predicted class], counts


def measure(
    truth: Int64[np.ndarray, " t"], share: Float64[np.ndarray, "t c"], majority: Int64[np.ndarray, " t"]
) -> Metrics:
    """Metrics of predicting the class of the largest share; of equal shares the first class is taken.

    truth: classes, 0 to c - 1. share: rows that sum to 1. majority: the most frequent class of each one's training set.
    """
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix

    answer = share.argmax(axis=1)
    with warnings.catch_warnings():  # an answer may be a class that the test set does not hold: that is no news
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", message="A single label was found")
        balanced, balanced_baseline = (float(balanced_accuracy_score(truth, told)) for told in (answer, majority))
    table = confusion_matrix(truth, answer, labels=range(share.shape[1]))
    return Metrics(
        accuracy=Figure(value=float(accuracy_score(truth, answer)), baseline=float(accuracy_score(truth, majority))),
        balanced_accuracy=Figure(value=balanced, baseline=balanced_baseline),
        auroc=_auroc(truth, share),
        confusion=tuple(tuple(int(count) for count in line) for line in table),
    )


def _auroc(truth: Int64[np.ndarray, " t"], share: Float64[np.ndarray, "t c"]) -> Figure:
    from sklearn.metrics import roc_auc_score

    classes = share.shape[1]
    absent = classes - len(np.unique(truth))
    if absent:
        return Figure(value=None, baseline=None, reason=f"{absent} of {classes} classes are not in the test set")
    if classes == 2:
        return Figure(value=float(roc_auc_score(truth, share[:, 1])), baseline=0.5)
    return Figure(value=float(roc_auc_score(truth, share, multi_class="ovr", average="macro")), baseline=0.5)
