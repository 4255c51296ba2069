"""Builds the compiled kernels, ``megagap._C``; all else is in pyproject.toml.

Where torch or a C++ compiler is missing, the package installs without them, with one warning, and computes with
plain torch.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    torch = None
    BuildExtension = build_ext

SOURCES = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
HEADERS = sorted(map(str, Path("csrc/cpu").glob("*.h")))


class BuildOrWarn(BuildExtension):  # type: ignore[misc,valid-type]
    """Builds the extension, or warns once and goes on without it."""

    def run(self) -> None:
        if torch is None:
            self._go_without("there is no torch to build with: install it, then megagap with --no-build-isolation")
            return
        try:
            for extension in self.extensions:
                extension.extra_compile_args = compile_flags()
            super().run()
        except Exception as error:
            self._go_without(f"the C++ compiler failed: {_first_line(error)}")

    def _go_without(self, reason: str) -> None:
        # The extension of an earlier build would be loaded in place of the one that failed.
        for extension in self.extensions:
            folder, _, name = extension.name.replace(".", "/").rpartition("/")
            for stale in Path(folder).glob(f"{name}.*.so"):
                stale.unlink()
        self.extensions = []
        print(f"warning: megagap is installed without compiled kernels: {reason}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


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


def extension() -> Extension:
    if torch is None:
        return Extension("megagap._C", SOURCES, optional=True)
    return CppExtension(
        "megagap._C",
        SOURCES,
        depends=HEADERS,
        include_dirs=[str(Path("csrc").resolve())],
        optional=True,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildOrWarn})
