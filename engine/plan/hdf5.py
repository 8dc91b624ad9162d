"""Lists of tiles in HDF5, read by a process of their own: damaged files crash HDF5, or keep it busy for ever.

Of 7,000 mutated copies one ended the process that read it and one never came to an end (HDF5 2.0, h5py 3.16). Such
a process runs this file, which imports nothing of ours.
"""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int

__all__ = ["BrokenError", "coords_in"]

SECONDS = 60  # for a file of at most 256 MiB in memory
ATTRIBUTES = (
    *("patch_size", "patch_size_level0", "level0_width", "level0_height"),
    *("patch_level", "downsample", "level_dim"),
)


class BrokenError(Exception):
    """What is wrong with a list, in words."""


def coords_in(content: bytes, most: int) -> tuple[Int[np.ndarray, "n 2"], Mapping[str, Any]]:
    """The dataset `coords` and those of its attributes that say how large tiles are. most: rows that it may have.

    Raises BrokenError for anything else.
    """
    command = [sys.executable, "-P", __file__, str(most), str(SECONDS)]
    done = subprocess.run(command, input=content, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        how = f"takes more than {SECONDS} s" if done.returncode == -signal.SIGALRM else "crashes HDF5"
        raise BrokenError(f"its list of tiles {how}")
    head, _, data = done.stdout.partition(b"\n")
    told = json.loads(head)
    if "wrong" in told:
        raise BrokenError(told["wrong"])
    return np.frombuffer(data, told["dtype"]).reshape(-1, 2), told["attributes"]


def told_of(content: bytes, most: int) -> tuple[dict[str, Any], bytes]:
    """What is told of a file, and the coordinates, once they are known to be few and all in the file."""
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            data = file["coords"]
            if data.is_virtual or data.external:  # HDF5 would open other files, and crashes where they are missing
                return {"wrong": "its coords lie in another file"}, b""
            if len(data.shape) != 2 or data.shape[1] != 2 or data.dtype.kind not in "iu":
                return {"wrong": f"its coords are {data.dtype} of shape {data.shape}"}, b""
            if data.shape[0] > most:
                return {"wrong": f"its list has {data.shape[0]} tiles, more than {most}"}, b""
            known = {name: np.asarray(data.attrs[name]) for name in ATTRIBUTES if name in data.attrs}
            attributes = {name: value.item() if value.size == 1 else value.tolist() for name, value in known.items()}
            return {"dtype": data.dtype.str, "attributes": attributes}, np.asarray(data[()]).tobytes()
    except Exception as error:  # noqa: BLE001 - a damaged file makes h5py raise anything at all
        return {"wrong": f"its list of tiles cannot be read ({type(error).__name__})"}, b""


def main() -> None:
    """Read a file from stdin, and write what is told of it and its coordinates to stdout."""
    most, seconds = map(int, sys.argv[1:])
    signal.alarm(seconds)  # by itself: whoever waits for it may be killed
    told, coords = told_of(sys.stdin.buffer.read(), most)
    sys.stdout.buffer.write(json.dumps(told, default=str).encode() + b"\n" + coords)


if __name__ == "__main__":
    main()
