"""Builds the compiled kernels, ``megagap._C``; all else is in pyproject.toml.

For the CPU always; for GPUs too where torch is a CUDA build and nvcc is there, or torch is a ROCm build.
``MEGAGAP_BUILD=cpu``, ``cuda`` or ``hip`` chooses, and then a failure is an error. Architectures are chosen as for any
extension of torch: ``TORCH_CUDA_ARCH_LIST``, ``PYTORCH_ROCM_ARCH``, else the GPUs that are seen.

Else, where kernels for GPUs do not build, those for the CPU are tried, and where torch or a C++ compiler is missing,
the package installs without them, with one warning, and computes with plain torch.

A wheel also gets the recipes of ``examples/``, as ``megagap/recipes``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    torch = None
    BuildExtension = build_ext

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
GPU_SOURCES = ["csrc/gpu/bindings.cpp", *sorted(map(str, Path("csrc/gpu").glob("*.cu")))]
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
GPU_LIBRARIES = {"cuda": ["cudart", "c10_cuda", "torch_cuda"], "hip": ["amdhip64", "c10_hip", "torch_hip"]}


class BuildWithRecipes(build_py):
    """Adds the recipes, which stand beside the package in a checkout."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "megagap"), ignore_errors=True)  # it may have modules that were removed
            shutil.copytree("examples/recipes", Path(self.build_lib, "megagap/recipes"))
        super().run()


class BuildOrWarn(BuildExtension):  # type: ignore[misc,valid-type]
    """Builds the extension, or warns once and goes on without it."""

    def run(self) -> None:
        chosen = os.environ.get("MEGAGAP_BUILD", "")
        if chosen:
            if reason := _obstacle(chosen):
                raise SystemExit(f"error: MEGAGAP_BUILD={chosen}: {reason}")
            self.force = True  # what an earlier build left may be newer than its sources, and for another target
            self._build(chosen)
            return
        if torch is None:
            self._go_without("there is no torch to build with: install it, then megagap with --no-build-isolation")
            return
        targets = [target for target in GPU_LIBRARIES if not _obstacle(target)]
        for target in targets:
            try:
                self._build(target)
                return
            except Exception as error:
                print(
                    f"warning: megagap is built without kernels for GPUs ({target}): {_first_line(error)}",
                    file=sys.stderr,
                )
        try:
            self._build("cpu")
        except Exception as error:
            self._go_without(f"the C++ compiler failed: {_first_line(error)}")

    def _build(self, target: str) -> None:
        for extension in self.extensions:
            configure(extension, target)
        # A build that fails leaves these changed.
        before = self.compiler, self.inplace
        try:
            super().run()
        except BaseException:
            self.compiler, self.inplace = before
            raise

    def _go_without(self, reason: str) -> None:
        # The extension of an earlier build would be loaded in place of the one that failed. A wheel is built elsewhere,
        # often by a Python without torch: the checkout's own extension stays.
        root = Path("." if self.inplace else self.build_lib)
        for extension in self.extensions:
            folder, _, name = extension.name.replace(".", "/").rpartition("/")
            for stale in (root / folder).glob(f"{name}.*.so"):
                stale.unlink()
        self.extensions = []
        print(f"warning: megagap is installed without compiled kernels: {reason}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) < 200 else f"{line[:100]} … {line[-100:]}"


def compile_flags() -> list[str]:
    """at::parallel_for needs OpenMP. Its symbols come from torch's own copy of gcc's runtime, so it is not linked:
    a second copy would have threads of its own. clang would ask for another runtime and computes on one thread.
    """
    compiler = os.environ.get("CXX", "c++").split()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    # Without contraction to fused multiply-adds, results are the same on every instruction set and torch's bit for bit.
    common = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", "-Wno-ignored-attributes"]
    common.append("-Wno-maybe-uninitialized")  # gcc 12 takes its own intrinsics for faulty (gcc bug 105593)
    return [*common, "-fopenmp-simd" if "clang" in version else "-fopenmp"]


def _obstacle(target: str) -> str | None:
    """Why this target cannot be built here, if so."""
    if target not in ("cpu", *GPU_LIBRARIES):
        return "unknown; possible: cpu, cuda, hip (or nothing, for what this machine has)"
    if torch is None:
        return "there is no torch to build with: install it, then megagap with --no-build-isolation"
    if target == "cuda":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is not a CUDA build"
        if cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin/nvcc").exists():
            return "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to where it is"
    if target == "hip":
        if torch.version.hip is None:
            return f"torch {torch.__version__} is not a ROCm build"
        if cpp_extension.ROCM_HOME is None:
            return "there is no ROCm: install it, or set ROCM_HOME to where it is"
    return None


def configure(extension: Extension, target: str) -> None:
    """Makes the extension that of one target. The GPU's sources need no hipify: they are written for both."""
    flags = compile_flags()
    extension.sources = list(CPU_SOURCES)
    extension.include_dirs = [str(Path("csrc").resolve()), *cpp_extension.include_paths()]
    extension.library_dirs = cpp_extension.library_paths()
    extension.libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    extension.extra_compile_args = flags
    if target in GPU_LIBRARIES:
        extension.sources += GPU_SOURCES
        extension.include_dirs = [str(Path("csrc").resolve()), *cpp_extension.include_paths("cuda")]
        extension.library_dirs = cpp_extension.library_paths("cuda")
        extension.libraries += GPU_LIBRARIES[target]
        extension.extra_compile_args = {"cxx": flags, "nvcc": ["-O3"]}


def extension() -> Extension:
    if torch is None:
        return Extension("megagap._C", CPU_SOURCES, optional=True)
    return CppExtension("megagap._C", CPU_SOURCES, depends=HEADERS)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildOrWarn, "build_py": BuildWithRecipes})
