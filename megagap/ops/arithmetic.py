"""Torch's own switches for a process's arithmetic on GPUs. They do not concern CPUs, whose results always repeat."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megagap.errors import ConfigError

CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable: the size and number of cuBLAS's workspaces. Only with some is the order of its sums fixed."""

REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


def sum_half_precision_in_fp32() -> None:
    """Let the matrix products of this process add up in fp32 to the end.

    By default, where cuBLAS or hipBLASLt splits a product's inner dimension over several blocks (split-K), their sums
    may be rounded to bf16 or fp16 before they are added: for weight gradients with few columns, over thousands of
    tokens.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """In this block torch chooses kernels whose results repeat bit for bit, and refuses what has none; if ``enabled``.

    :func:`is_deterministic` tells. Before the first matrix product: cuBLAS reads the environment then.
    Raises :class:`ConfigError` if the environment asks for cuBLAS workspaces with which results do not repeat.
    """
    if not enabled:
        yield
        return
    given = os.environ.get(CUBLAS_WORKSPACES)
    if given is not None and given not in REPEATABLE_WORKSPACES:
        raise ConfigError(
            f"{CUBLAS_WORKSPACES}={given} in the environment: with train.deterministic = true it must be "
            f"{' or '.join(REPEATABLE_WORKSPACES)}\n  unset, it is."
        )
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    os.environ[CUBLAS_WORKSPACES] = given or REPEATABLE_WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # else every new tensor would first be filled with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
        if given is None:
            del os.environ[CUBLAS_WORKSPACES]


def is_deterministic() -> bool:
    """Whether this process computes within :func:`deterministic_kernels`."""
    return torch.are_deterministic_algorithms_enabled()
