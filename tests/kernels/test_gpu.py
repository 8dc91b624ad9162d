import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    not (find_spec("triton") and find_spec("torch")), reason="the GPU kernels need torch and Triton: pip install triton"
)
CASES = Path(__file__).with_name("gpu_cases.py")


def run_cases(interpret):
    """Warnings fail there, too: the child reads the same pyproject.toml."""
    env = os.environ | {"TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=CASES.parents[2])


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    done = run_cases("1")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow
def test_on_a_gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here, or torch is built without one")
    done = run_cases("0")
    assert done.returncode == 0, done.stdout + done.stderr


SIGNATURES = {  # a kernel's name, the types of its arguments, its constants
    "pack": (
        "_shrink",
        "*u8 *i32 *i32 *i32 *fp32 *u8 fp32 i32 i32 i32 i32",
        {"taps": 3, "rows": 4, "lanes": 256},
    ),
    "reslice": (
        "_reslice",
        "*i16 *i32 *i64 *fp32 *fp32 *i64 *fp32 *fp32 *fp32 *fp32 *u8 i32 fp32 i32 i32 i32 i32 i32 i32 i32 i32",
        {"rows": 4, "lanes": 256},
    ),
    "reslice to HU": (
        "_reslice",
        "*i16 *i32 *i64 *fp32 *fp32 *i64 *fp32 *fp32 *fp32 *fp32 *i16 i32 fp32 i32 i32 i32 i32 i32 i32 i32 i32",
        {"rows": 4, "lanes": 256},
    ),
    "counts": ("_sum", "*u8 *fp32 i32 i32", {"lanes": 256}),
    "sums": ("_sum", "*fp64 *fp64 i32 i32", {"lanes": 256}),
    "down": ("_grow", "*fp32 *i64 *fp64 *fp64 *fp64 i32 i32", {"lanes": 256}),
    "across": ("_grow", "*fp64 *i64 *fp64 *fp64 *fp64 i32 i32", {"lanes": 256}),
}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled for the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", SIGNATURES)
def test_compiles_for_a_gpu_that_is_not_here(kernel, capability, tmp_path, monkeypatch):
    """The interpreter takes what the compiler refuses. No product may be fused into a sum: it would round otherwise."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from patchmill.kernels import gpu

    name, types, constants = SIGNATURES[kernel]
    function = getattr(gpu, name)
    signature = dict(zip(function.arg_names, [*types.split(), *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(function, signature, constants)
    done = compile(source, target=GPUTarget("cuda", capability, 32), options=gpu.UNFUSED)
    assert done.asm["cubin"]
    assert "fma." not in done.asm["ptx"]


def test_the_kernels_of_the_cpu_load_neither_torch_nor_triton():
    code = "import sys, patchmill.kernels; assert not sys.modules.keys() & {'torch', 'triton'}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
