"""The sum of neighbouring RGB pixels with weights, as vector instructions that LLVM does not find by itself.

What numba keeps on disk is judged by the dates of the files that use it: touch those when this changes.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["add_pixels"]


def _sum_of_pixels(_: Any, line: Any, at: Any, weights: Any, first: Any, count: Any, sums: Any, to: Any) -> Any:
    """Add up `count` neighbouring RGB pixels with weights, a fourth value beside them: three times LLVM's own loop."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line, at, weights, first, count, sums, to = args
        source, factors, target = (
            context.make_array(signature.args[number])(context, builder, array).data
            for number, array in ((0, line), (2, weights), (5, sums))
        )
        four = ir.VectorType(ir.FloatType(), 4)

        def place(array: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(array, [index]), four.as_pointer())

        total = cgutils.alloca_once_value(builder, ir.Constant(four, [0.0] * 4))  # type: ignore[no-untyped-call]
        with cgutils.for_range(builder, count) as loop:
            pixel = builder.load(place(source, builder.add(at, builder.mul(loop.index, ir.Constant(at.type, 3)))))
            pixel.align = 4
            factor = builder.load(builder.gep(factors, [builder.add(first, loop.index)]))
            factor = builder.insert_element(ir.Constant(four, ir.Undefined), factor, ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
            factor = builder.shuffle_vector(factor, factor, lanes)
            builder.store(builder.fadd(builder.load(total), builder.fmul(factor, pixel)), total)
        builder.store(builder.load(total), place(target, to)).align = 4
        return context.get_dummy_value()

    return types.void(line, types.intp, weights, types.intp, types.intp, sums, types.intp), generate


add_pixels: Any = intrinsic(_sum_of_pixels)
