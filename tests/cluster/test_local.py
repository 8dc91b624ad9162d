"""Each worker sees a GPU of its own."""

import pytest

from patchmill.cluster.local import gpu_env


@pytest.mark.parametrize(
    ("number", "gpus", "visible", "seen"),
    [
        (0, 0, "", None),
        (0, 2, "", "0"),
        (1, 2, "", "1"),
        (2, 2, "", "0"),  # more workers than GPUs share them
        (1, 2, "5,3", "3"),  # of those that were given to us, by their own names
        (1, 2, "GPU-aa,GPU-bb", "GPU-bb"),
    ],
)
def test_gpus_are_shared_out(number, gpus, visible, seen):
    environment = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    assert gpu_env(number, gpus, environment).get("CUDA_VISIBLE_DEVICES") == seen
