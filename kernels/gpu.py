"""Every kernel in Triton, for torch tensors on a GPU. Runs on CPU tensors where TRITON_INTERPRET=1 is set beforehand.

Sums take the same order as on the CPU, and no product is fused into a sum, which would round once instead of twice. So
the results are the same bits: shown in the interpreter, not yet on a GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32, Float64, Int32, Integer, Num, Shaped, UInt8

from patchmill.kernels.areas import check_areas
from patchmill.kernels.boxes import box_weights, check
from patchmill.kernels.slices import LEVELS, Table, check_slices, on_its_side

__all__ = ["pack", "reslice", "tissue_fraction"]

ROWS, LANES = 4, 256  # output rows, and bytes of each, that one program makes
UNFUSED = {"enable_fp_fusion": False}
jit: Callable[[Callable[..., Any]], Any] = triton.jit  # neither has types of its own
device_of: Callable[[torch.Tensor], AbstractContextManager[None]] = torch.cuda.device_of


def pack(
    cells: UInt8[torch.Tensor, "s h w 3"],
    where: Int32[torch.Tensor, "rows columns"],
    origins: Int32[torch.Tensor, "n 2"],
    extent: float,
    out: UInt8[torch.Tensor, "n p p 3"],
) -> None:
    """Cut square tiles out of a block of cells, shrink each by area, and write them into a batch buffer, in one pass.

    Arguments mean what they do for `patchmill.kernels.cpu.pack`. cells and out lie on one device. where and origins may
    lie there or on the CPU, where they are checked: from a GPU they come only after all that was queued before. Returns
    once the work is queued.

    Raises ValueError if a tile reaches out of its block or would have to be enlarged, and for a tensor of another type
    or on another device.
    """
    for picture in (cells, out):
        demand(picture, torch.uint8, {out.device})
    for table in (where, origins):
        demand(table, torch.int32, {out.device, torch.device("cpu")})
    places, corners = where.cpu().numpy(), origins.cpu().numpy()
    check(tuple(cells.shape), places, corners, extent, tuple(out.shape), out.is_contiguous())
    if not len(origins):
        return
    pixels = out.shape[1]
    first, weights = box_on(out.device, float(extent), pixels)
    where, origins = (table.to(out.device).contiguous() for table in (where, origins))
    with device_of(out):
        _shrink[len(origins), triton.cdiv(pixels, ROWS), triton.cdiv(pixels * 3, LANES)](
            cells.contiguous(), where, origins, first, weights, out,
            float((extent / pixels) ** 2), cells.shape[1], cells.shape[2], where.shape[1], pixels,
            taps=weights.shape[1], rows=ROWS, lanes=LANES, **UNFUSED,
        )  # fmt: skip


def demand(tensor: torch.Tensor, dtype: torch.dtype, devices: set[torch.device]) -> None:
    """Raises ValueError for a tensor of another type or on none of the devices: a kernel would misread its memory."""
    if tensor.dtype != dtype or tensor.device not in devices:
        wanted = " or ".join(sorted(map(str, devices)))
        raise ValueError(f"a tensor is {tensor.dtype} on {tensor.device}, not {dtype} on {wanted}")


@lru_cache(maxsize=64)
def box_on(
    device: torch.device, extent: float, pixels: int
) -> tuple[Int32[torch.Tensor, " p"], Float32[torch.Tensor, "p k"]]:
    """The box filter's weights on a device: copied once, since a run has few extents."""
    first, weights = box_weights(extent, pixels)
    return torch.from_numpy(first).to(device, torch.int32), torch.from_numpy(weights).to(device)


@jit
def _shrink(  # type: ignore[no-untyped-def]
    cells, where, origins, first, weights, out, area, h, w, columns, pixels,
    taps: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * rows + tl.arange(0, rows)[:, None]
    lane = tl.program_id(2) * lanes + tl.arange(0, lanes)[None, :]  # bytes of a row: neighbours write side by side
    j, channel = lane // 3, lane % 3
    left = tl.load(origins + tile * 2) + tl.load(first + j, mask=j < pixels, other=0)
    top = tl.load(origins + tile * 2 + 1) + tl.load(first + i, mask=i < pixels, other=0)
    total = tl.zeros([rows, lanes], tl.float32)
    for across in range(taps):
        wide = tl.load(weights + j * taps + across, mask=j < pixels, other=0)
        x = left + across
        column, within = where + x // w, cells + (x % w) * 3 + channel
        strip = tl.zeros([rows, lanes], tl.float32)
        for down in range(taps):
            high = tl.load(weights + i * taps + down, mask=i < pixels, other=0)
            y = top + down
            # Without weight a pixel may lie outside the block, whose edge has no cell.
            number = tl.load(column + (y // h) * columns, mask=(wide > 0) & (high > 0), other=-1)
            line = (number.to(tl.int64) * h + y % h) * (w * 3)  # 64 bits: cells may be many gigabytes
            pixel = tl.load(within + line, mask=number >= 0, other=255)
            strip += high * pixel.to(tl.float32)
        total += wide * strip
    # Divided, not multiplied by the inverse, and to the last bit: at whole ratios a tie stays a tie.
    level = (tl.div_rn(total, area) + 0.5).to(tl.int32)
    at = ((tile * pixels + i) * pixels) * 3 + lane
    tl.store(out + at, level.to(tl.uint8), mask=(i < pixels) & (j < pixels))


def reslice(
    voxels: Shaped[torch.Tensor, "d h w"],
    slices: Int32[torch.Tensor, "n 3"],
    rows: Table,
    columns: Table,
    gain: Float32[np.ndarray, "3"],
    offset: Float32[np.ndarray, "3"],
    out: Integer[torch.Tensor, "n p p 3"],
) -> None:
    """Draw slices of a volume as square tiles of grey levels or HU, in one pass from voxels to a batch buffer.

    Arguments mean what they do for `patchmill.kernels.cpu.reslice`. voxels, of any strides, and out lie on one device.
    slices may lie there or on the CPU, where they are checked: from a GPU they come only after all that was queued
    before. The others are small NumPy arrays. Returns once the work is queued.

    Raises ValueError for another type, shape or device, for a slice or a voxel with weight that is not there, and for
    gaps in the buffer.
    """
    demand(voxels, voxels.dtype, {out.device})
    demand(slices, torch.int32, {out.device, torch.device("cpu")})
    shape, (kind, to) = tuple(voxels.shape), (str(each.dtype).removeprefix("torch.") for each in (voxels, out))
    fit = out.is_contiguous() and to in LEVELS
    row, column = check_slices(shape, kind, slices.cpu().numpy(), rows, columns, gain, offset, tuple(out.shape), fit)
    if not len(slices):
        return
    low, high = LEVELS[to]
    offset = offset - np.float32(low)  # so that sums are of levels above the least
    pixels, (across, down, along) = out.shape[1], voxels.stride()
    i_step, j_step = pixels * 3, 3
    if on_its_side(shape, voxels.stride()):
        row, column, down, along, i_step, j_step = column, row, along, down, j_step, i_step
    tables = [
        torch.tensor(each, device=out.device)
        for each in (row.first, row.weights, row.total, column.first, column.weights, column.total, gain, offset)
    ]
    with device_of(out):
        _reslice[len(slices), triton.cdiv(pixels, ROWS), triton.cdiv(pixels * 3, LANES)](
            voxels, slices.to(out.device).contiguous(), *tables, out, low, float(high - low),
            across, down, along, i_step, j_step, pixels, row.weights.shape[1], column.weights.shape[1],
            rows=ROWS, lanes=LANES, **UNFUSED,
        )  # fmt: skip


@jit
def _reslice(  # type: ignore[no-untyped-def]
    voxels, slices, row_first, row_weights, row_total, first, weights, total, gain, offset, out,
    least, span, across, down, along, i_step, j_step, pixels, row_taps, taps, rows: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * rows + tl.arange(0, rows)[:, None]
    lane = tl.program_id(2) * lanes + tl.arange(0, lanes)[None, :]
    j, channel = lane // 3, lane % 3
    factor, shift = tl.load(gain + channel), tl.load(offset + channel)
    left = tl.load(first + j, mask=j < pixels, other=0)
    top = tl.load(row_first + i, mask=i < pixels, other=0)
    corner = voxels + tl.load(slices + tile * 3 + channel).to(tl.int64) * across  # 64 bits: a volume may be large
    sums = tl.zeros([rows, lanes], tl.float32)
    for wide in range(taps):
        share = tl.load(weights + j * taps + wide, mask=j < pixels, other=0)
        column = corner + (left + wide) * along
        strip = tl.zeros([rows, lanes], tl.float32)
        for high in range(row_taps):
            weight = tl.load(row_weights + i * row_taps + high, mask=i < pixels, other=0)
            # Without weight a voxel may lie outside.
            voxel = tl.load(column + (top + high) * down, mask=(share > 0) & (weight > 0), other=0)
            level = voxel.to(tl.float32) * factor + shift
            level = tl.where(level > 0, level, 0.0)  # 0 also where it is no number
            strip += weight * tl.where(level < span, level, span)
        sums += share * strip
    area = tl.load(row_total + i, mask=i < pixels, other=1) * tl.load(total + j, mask=j < pixels, other=1)
    mean = (tl.div_rn(sums, area) + 0.5).to(tl.int32) + least
    at = tile * pixels * pixels * 3 + i * i_step + j * j_step + channel
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=(i < pixels) & (j < pixels))


def tissue_fraction(
    tissue: Bool[torch.Tensor, "h w"],
    scale: float,
    x: Float64[torch.Tensor, " columns"],
    y: Float64[torch.Tensor, " rows"],
    span: float,
) -> tuple[Float32[torch.Tensor, "rows columns"], UInt8[torch.Tensor, "rows columns"]]:
    """How much of each square of a grid is tissue: as a fraction from 0 to 1, and as archives store it, 0 to 255.

    Arguments mean what they do for `patchmill.kernels.cpu.tissue_fraction`; all tensors lie on one device.

    Raises ValueError if the mask has no pixels, if scale or span are not above 0, and for a tensor of another type or
    on another device.
    """
    for tensor, dtype in ((tissue, torch.bool), (x, torch.float64), (y, torch.float64)):
        demand(tensor, dtype, {tissue.device})
    check_areas(tuple(tissue.shape), scale, span)
    with device_of(tissue):
        strips = lengths(sums(tissue.contiguous().view(torch.uint8), torch.float32), y, scale, span)
        areas = lengths(sums(strips, torch.float64), x, scale, span)
    fraction = divided(areas, span**2).clamp(0, 1).float()
    return fraction, torch.round(fraction * 255).to(torch.uint8)


def divided(values: Float64[torch.Tensor, " *n"], by: float) -> Float64[torch.Tensor, " *n"]:
    """A quotient to the last bit: on a GPU, torch multiplies by the inverse of what is no tensor there."""
    return values / torch.full_like(values, by)


def sums(values: Num[torch.Tensor, "n m"], dtype: torch.dtype) -> Float[torch.Tensor, "n+1 m"]:
    """Running sums down the rows, from 0, added up in order: a parallel scan would round otherwise."""
    length, width = values.shape
    out = torch.zeros((length + 1, width), dtype=dtype, device=values.device)
    if width:
        _sum[(triton.cdiv(width, LANES),)](values, out, length, width, lanes=LANES, **UNFUSED)
    return out


@jit
def _sum(values, out, length, width, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    values += lane
    out += lane
    total = tl.zeros([lanes], out.dtype.element_ty)
    for _ in range(length):
        total += tl.load(values, mask=lane < width, other=0).to(total.dtype)
        values += width
        out += width
        tl.store(out, total, mask=lane < width)


def lengths(
    integral: Float[torch.Tensor, "n m"], start: Float64[torch.Tensor, " k"], scale: float, span: float
) -> Float64[torch.Tensor, "m k"]:
    """What an integral grows by from each start on, over a span, in level-0 pixels."""
    n, width = integral.shape
    count = len(start)
    at = divided(torch.stack([start, start + span]), scale).clamp(0, n - 1)
    low = at.long().clamp(max=n - 2)
    factor = torch.full((1,), scale, dtype=torch.float64, device=start.device)  # a plain number would have 32 bits
    out = torch.empty((width, count), dtype=torch.float64, device=start.device)
    if out.numel():
        _grow[count, triton.cdiv(width, LANES)](
            integral, low, at - low, factor, out, count, width, lanes=LANES, **UNFUSED
        )
    return out


@jit
def _grow(integral, low, part, factor, out, count, width, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    k = tl.program_id(0)
    lane = tl.program_id(1) * lanes + tl.arange(0, lanes)
    start = _between(integral, low + k, part + k, lane, width)
    end = _between(integral, low + count + k, part + count + k, lane, width)
    tl.store(out + lane.to(tl.int64) * count + k, (end - start) * tl.load(factor), mask=lane < width)


@jit
def _between(integral, low, part, lane, width):  # type: ignore[no-untyped-def]
    """A row of an integral at a fractional position, linearly between the whole ones."""
    line = integral + tl.load(low) * width + lane
    share = tl.load(part)
    before = tl.load(line, mask=lane < width, other=0).to(tl.float64)
    after = tl.load(line + width, mask=lane < width, other=0).to(tl.float64)
    return before * (1 - share) + after * share
