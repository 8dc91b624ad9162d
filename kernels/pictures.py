"""What becomes of one picture after its codec: 16 bits to 8, transparency on white, and weighted means of pixels."""

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt16

from patchmill.kernels.compiling import compiled
from patchmill.kernels.pixels import add_pixels

__all__ = ["eight_bits", "on_white", "resample"]


def eight_bits(samples: UInt16[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Value / 257, rounded: the full range of 16 bits, whatever is present of it."""
    out = np.empty(samples.shape, np.uint8)
    _eight_bits(np.ascontiguousarray(samples, np.uint16).reshape(-1), out.reshape(-1))
    return out


@compiled
def _eight_bits(samples: UInt16[np.ndarray, " n"], out: UInt8[np.ndarray, " n"]) -> None:
    for k in range(len(samples)):
        out[k] = (np.uint32(samples[k]) + np.uint32(128)) // np.uint32(257)


def on_white(samples: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w d"]:
    """Grey or colours, and alpha behind them, on white: what Pillow's `alpha_composite` shows, level by level."""
    out = np.empty((*samples.shape[:2], samples.shape[2] - 1), np.uint8)
    _on_white(np.ascontiguousarray(samples).reshape(-1, samples.shape[2]), out.reshape(-1, out.shape[2]))
    return out


@compiled
def _on_white(samples: UInt8[np.ndarray, "n c"], out: UInt8[np.ndarray, "n d"]) -> None:
    if out.shape[1] == 3:
        for n in range(len(samples)):
            alpha = np.uint32(samples[n, 3])
            white = (np.uint32(255) - alpha) * np.uint32(255) + np.uint32(128)
            out[n, 0] = _over_255(np.uint32(samples[n, 0]) * alpha + white)
            out[n, 1] = _over_255(np.uint32(samples[n, 1]) * alpha + white)
            out[n, 2] = _over_255(np.uint32(samples[n, 2]) * alpha + white)
    else:
        for n in range(len(samples)):
            alpha = np.uint32(samples[n, 1])
            white = (np.uint32(255) - alpha) * np.uint32(255) + np.uint32(128)
            out[n, 0] = _over_255(np.uint32(samples[n, 0]) * alpha + white)


@compiled
def _over_255(value: np.uint32) -> np.uint32:
    return (value + (value >> np.uint32(8))) >> np.uint32(8)


def resample(
    pixels: UInt8[np.ndarray, "h w c"],
    y: Int64[np.ndarray, " m"],
    rows: Float32[np.ndarray, "m i"],
    x: Int64[np.ndarray, " n"],
    columns: Float32[np.ndarray, "n j"],
    out: UInt8[np.ndarray, "p q 3"],
    corner: tuple[int, int],
) -> None:
    """Fill a rectangle of `out`, from its corner (y, x) on, with weighted means of pixels, rounded half up.

    pixels: grey or RGB; grey fills all three channels. y, x: the first input pixel of each output pixel, ascending.
    rows, columns: the weights of the input pixels from there, none of them outside; all have the same sum.
    """
    m, n, (top, left) = len(y), len(x), corner
    single = rows.shape[1] == columns.shape[1] == 1 and (np.diff(y) == 1).all() and (np.diff(x) == 1).all()
    if single and pixels.shape[2] == 3:
        out[top : top + m, left : left + n] = pixels[y[0] : y[0] + m, x[0] : x[0] + n]  # each pixel by itself
        return
    area = np.float32(float(rows[0].sum()) * float(columns[0].sum()))
    _resample(np.ascontiguousarray(pixels), y, rows, x, columns, area, out, *corner)


@compiled
def _resample(
    pixels: UInt8[np.ndarray, "h w c"],
    y: Int64[np.ndarray, " m"],
    rows: Float32[np.ndarray, "m i"],
    x: Int64[np.ndarray, " n"],
    columns: Float32[np.ndarray, "n j"],
    area: np.float32,
    out: UInt8[np.ndarray, "p q 3"],
    top: int,
    left: int,
) -> None:
    channels = pixels.shape[2]
    low, length = channels * x[0], channels * (x[-1] + columns.shape[1] - x[0])
    flat = pixels.reshape(pixels.shape[0], pixels.shape[1] * channels)
    weights, taps = columns.reshape(columns.size), columns.shape[1]
    line = np.zeros(length + 1, np.float32)  # one more, since pixels are added up four values at a time
    sums = np.empty(3 * len(x) + 1, np.float32)
    for m in range(len(y)):
        _add_rows(flat[:, low : low + length], y[m], rows[m], line)
        for n in range(len(x)):
            if channels == 3:
                add_pixels(line, 3 * (x[n] - x[0]), weights, n * taps, taps, sums, 3 * n)
            else:
                total = np.float32(0)
                for j in range(taps):
                    total += columns[n, j] * line[x[n] - x[0] + j]
                sums[3 * n] = sums[3 * n + 1] = sums[3 * n + 2] = total
        target = out[top + m, left : left + len(x)].reshape(3 * len(x))
        for k in range(len(target)):
            # Divided, not multiplied by the inverse: at whole ratios the sums are exact, so a tie stays a tie.
            target[k] = np.uint8(sums[k] / area + np.float32(0.5))


@compiled
def _add_rows(
    pixels: UInt8[np.ndarray, "h k"], top: int, weights: Float32[np.ndarray, " i"], line: Float32[np.ndarray, " l"]
) -> None:
    """Four at a time, since what is slow is to load and store the line; the order of the sum is that of the rows."""
    taps = len(weights)
    nothing = np.float32(0)
    for i in range(0, taps, 4):
        one, two = pixels[top + i], pixels[top + min(i + 1, taps - 1)]
        three, four = pixels[top + min(i + 2, taps - 1)], pixels[top + min(i + 3, taps - 1)]
        a, b = weights[i], weights[i + 1] if i + 1 < taps else nothing
        c, d = weights[i + 2] if i + 2 < taps else nothing, weights[i + 3] if i + 3 < taps else nothing
        for k in range(pixels.shape[1]):
            total = line[k] if i else nothing
            total += a * np.float32(one[k])
            total += b * np.float32(two[k])
            total += c * np.float32(three[k])
            total += d * np.float32(four[k])
            line[k] = total
