"""Inner loops, one public name for each, whatever runs it. Imports nothing of ours.

`pack` is the one that runs; `patchmill.kernels.reference` is its slow definition, which tests judge it by.
"""

from patchmill.kernels.cpu import pack

__all__ = ["pack"]
