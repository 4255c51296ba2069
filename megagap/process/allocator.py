"""The C library's memory allocator on CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning it: one step's activations reuse the memory of the last.

    By default it maps each block above 32 MiB anew and returns it when freed, so that a step touches all its pages for
    the first time, with a page fault each. Returns whether it was set; other C libraries have no such default.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
