"""Inner loops, one public name for each, whatever runs it. Imports nothing of ours.

What is named here runs on the CPU. `patchmill.kernels.gpu` has the same names, but `resample`, for tensors on a GPU; it
needs torch and Triton, so nothing imports it unasked. `patchmill.kernels.reference` holds the slow definitions, which
tests judge both by.
"""

from patchmill.kernels.cpu import pack, resample, reslice, tissue_fraction

__all__ = ["pack", "resample", "reslice", "tissue_fraction"]
