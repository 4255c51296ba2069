"""The compiled kernels of ``csrc/``, if this installation has them."""

import warnings


def _load() -> bool:
    try:
        import megagap._C  # noqa: F401  (loading it registers torch.ops.megagap)
    except ImportError as error:
        reason = "they were not built" if isinstance(error, ModuleNotFoundError) else f"they do not load: {error}"
        warnings.warn(
            f"megagap computes with plain torch, without its compiled kernels: {reason}. "
            "With a C++ compiler, build them by: pip install --no-build-isolation --no-deps -e .",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


AVAILABLE = _load()
