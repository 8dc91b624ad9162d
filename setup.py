"""Maps the top-level folders to the one import name: engine/ is patchmill, kernels/ is patchmill.kernels, and so on."""

from setuptools import find_packages, setup

FOLDERS = {
    "patchmill": "engine",
    "patchmill.kernels": "kernels",
    "patchmill.benchmarks": "benchmarks",
    "patchmill.configs": "configs",
}

setup(
    package_dir=FOLDERS,
    packages=[*FOLDERS, *(f"patchmill.{name}" for name in find_packages("engine"))],
    package_data={"patchmill": ["py.typed"], "patchmill.configs": ["*/*.yaml"], "patchmill.encoders": ["tiles/*"]},
)
