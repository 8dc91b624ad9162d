"""The weighted vote of the nearest neighbours, as DINO does it: exact, in chunks of bounded memory.

Source of the protocol: facebookresearch/dinov3, dinov3/eval/knn.py: unit vectors, dot product, softmax(similarity / T)
over the best max(k) neighbours, the weights of the first k summed per class; T = 0.07, k in 10, 20, 100, 200.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from patchmill.probes.splits import Split

__all__ = ["KS", "TEMPERATURE", "nearest", "shares", "vote"]

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_CHUNK_BYTES = 64 << 20  # of similarities that are held at once


def nearest(
    vectors: Float32[np.ndarray, "n d"], split: Split, k: int
) -> tuple[Float32[np.ndarray, "t k"], Int64[np.ndarray, "t k"]]:
    """Similarities and rows of the k training vectors nearest to each test vector, best first.

    vectors: unit vectors. k: at most `split.smallest`. Of equally near ones at the k-th place any may be taken.
    """
    test, train = np.flatnonzero(split.test), np.flatnonzero(split.train)
    known, fold = vectors[train], split.fold[train]
    similarity = np.empty((len(test), k), np.float32)
    row = np.empty((len(test), k), np.int64)
    step = max(1, _CHUNK_BYTES // (4 * len(train)))
    for start in range(0, len(test), step):
        part = test[start : start + step]
        near = vectors[part] @ known.T  # [step, train]
        near[split.fold[part, None] == fold] = -np.inf  # never its own group
        best = np.argpartition(near, -k, axis=1)[:, -k:]
        score = np.take_along_axis(near, best, axis=1)
        order = np.lexsort((best, -score), axis=1)  # by score, then by row
        similarity[start : start + step] = np.take_along_axis(score, order, axis=1)
        row[start : start + step] = train[np.take_along_axis(best, order, axis=1)]
    return similarity, row


def vote(
    similarity: Float32[np.ndarray, "t k"],
    labels: Int64[np.ndarray, "t k"],
    classes: int,
    ks: Sequence[int],
    temperature: float,
) -> Mapping[int, Float64[np.ndarray, "t c"]]:
    """Weight of every class among the first k neighbours, for each k of `ks`; a row sums to at most 1.

    similarity: best first. labels: the neighbours' classes, 0 to classes - 1.
    """
    logits = similarity.astype(np.float64) / temperature
    weights = np.exp(logits - logits[:, :1])  # the first is the largest
    weights /= weights.sum(axis=1, keepdims=True)
    votes = {}
    for k in ks:
        votes[k] = np.stack([np.where(labels[:, :k] == c, weights[:, :k], 0).sum(axis=1) for c in range(classes)], 1)
    return votes


def shares(votes: Float64[np.ndarray, "t c"]) -> Float64[np.ndarray, "t c"]:
    """Votes scaled so that a row sums to 1: what is ranked for AUROC, and it depends on no other k."""
    total: Float64[np.ndarray, "t 1"] = votes.sum(axis=1, keepdims=True)
    share: Float64[np.ndarray, "t c"] = votes / total
    return share
