"""Counting the codes of a Huffman-coded stream."""

import numpy as np
from jaxtyping import UInt8

from patchmill.kernels.compiling import compiled

__all__ = ["holds_codes"]


def holds_codes(data: bytes, bits: UInt8[np.ndarray, "c 65536"], count: int) -> bool:
    """Whether a stream holds so many groups of c codes, each with the bits that follow it.

    bits: for each code of a group, how many bits it takes with what follows it, at most 32, by the 16 bits that it
    begins with; 0 where there is no such code.
    """
    stream = np.frombuffer(data + bytes(3), np.uint8)  # so that 16 bits can be looked at from the last one on
    return bool(_holds_codes(stream, np.ascontiguousarray(bits), count, 8 * len(data)))


@compiled
def _holds_codes(stream: UInt8[np.ndarray, " n"], bits: UInt8[np.ndarray, "c 65536"], count: int, length: int) -> bool:
    at = 0
    for _ in range(count):
        for code in range(len(bits)):
            byte = at >> 3
            if at >= length:
                return False
            word = np.int64(stream[byte]) << 16 | np.int64(stream[byte + 1]) << 8 | np.int64(stream[byte + 2])
            taken = bits[code, (word >> (8 - (at & 7))) & 0xFFFF]
            if taken == 0:
                return False
            at += int(taken)
            if at > length:
                return False
    return True
