"""Weighted sums along lines of numbers, in the machine's vectors, which no loop that numba compiles would become."""

from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from patchmill.kernels.compiling import compiled
from patchmill.kernels.slices import Axis

__all__ = ["BAND", "TAPS", "narrow", "padded"]

BAND = 8  # lines that are summed together
TAPS = 4  # weights that are taken together
PIXELS = 8  # sums of a line that are made together: a vector


def padded(axis: Axis) -> tuple[Int64[np.ndarray, " q"], Float32[np.ndarray, "m q"]]:
    """Places and weights of an axis for `narrow`, with zeros up to whole vectors.

    Places count from the first voxel of the axis that has weight.
    """
    count, taps = axis.weights.shape
    first = np.pad(axis.first - axis.reach[0], (0, -count % PIXELS), mode="edge")
    weights = np.zeros((taps + -taps % TAPS, len(first)), np.float32)
    weights[:taps, :count] = axis.weights.T
    return first, weights


@compiled
def narrow(
    lines: Float32[np.ndarray, "8 w"],
    first: Int64[np.ndarray, " q"],
    weights: Float32[np.ndarray, "m q"],
    sums: Float32[np.ndarray, "8 q"],
) -> None:
    """Per line and place j, the sum of weights[k, j] * line[first[j] + k] over k, added up in that order.

    All arrays are contiguous, q is a multiple of 8 and m of 4. A line goes on for m numbers behind its last place, and
    they are finite.
    """
    taps, places = weights.shape
    sums[:] = 0
    for k in range(0, taps, TAPS):
        for j in range(0, places, PIXELS):
            _narrow_vector(lines, first, weights, k, j, sums)


def _vector(_: Any, lines: Any, first: Any, weights: Any, k: Any, j: Any, sums: Any) -> Any:
    """Eight sums of each line grow by four products. Four numbers are loaded at each place, then transposed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def array(place: int) -> Any:
            return context.make_array(signature.args[place])(context, builder, args[place])

        def number(value: int) -> Any:
            return ir.Constant(ir.IntType(64), value)

        def row(of: Any, index: Any) -> Any:
            return builder.gep(of.data, [builder.mul(builder.extract_value(of.shape, 1), index)])

        def vector(base: Any, at: Any, length: int) -> Any:
            return builder.bitcast(builder.gep(base, [at]), ir.VectorType(ir.FloatType(), length).as_pointer())

        def loaded(base: Any, at: Any, length: int) -> Any:
            return builder.load(vector(base, at, length), align=4)

        def mixed(a: Any, b: Any, places: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))

        lines, first, weights, sums = (array(place) for place in (0, 1, 2, 5))
        k, j = args[3:5]
        taps = [loaded(row(weights, builder.add(k, number(t))), j, PIXELS) for t in range(TAPS)]
        starts = [builder.load(builder.gep(first.data, [builder.add(j, number(p))])) for p in range(PIXELS)]
        for r in range(BAND):
            line = builder.gep(row(lines, number(r)), [k])
            four = [loaded(line, start, TAPS) for start in starts]
            pairs = [mixed(four[p], four[p + 4], list(range(8))) for p in range(4)]
            low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
            halves = [(mixed(pairs[0], pairs[1], each), mixed(pairs[2], pairs[3], each)) for each in (low, high)]
            low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
            numbers = [mixed(half[0], half[1], each) for half in halves for each in (low, high)]
            to = row(sums, number(r))
            total = loaded(to, j, PIXELS)
            for weight, values in zip(taps, numbers, strict=True):
                total = builder.fadd(total, builder.fmul(weight, values))
            builder.store(total, vector(to, j, PIXELS), align=4)
        return context.get_dummy_value()

    return types.void(lines, first, weights, types.intp, types.intp, sums), generate


_narrow_vector: Any = intrinsic(_vector)
