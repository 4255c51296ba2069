"""Runs that must repeat bit for bit on a GPU, and sums of half precision: what is set, without a GPU."""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch

from megagap.errors import ConfigError
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.ops.arithmetic import CUBLAS_WORKSPACES, deterministic_kernels, sum_half_precision_in_fp32
from tests.launching import finish, launch
from tests.recipes import write_recipe

CUDA = torch.device("cuda", 0)

attention = importlib.import_module("megagap.ops.attention")
document_mask = importlib.import_module("megagap.ops.document_mask")


@pytest.fixture
def on_hopper(monkeypatch):
    """``libraries``: modules of flash-attn that are installed on a pretended H100."""

    def pretend(libraries):
        monkeypatch.setattr(attention, "is_hopper", lambda device: True)
        monkeypatch.setattr(document_mask, "is_hopper", lambda device: True)
        monkeypatch.setattr(attention, "gpu_library", lambda name, *tensors: libraries.get(name))

    return pretend


def tensors(dtype: torch.dtype = torch.bfloat16):
    """Queries, keys, values that claim to be on a GPU."""
    return [SimpleNamespace(is_cuda=True, dtype=dtype, shape=(2, 512, heads, 64), device=CUDA) for heads in (8, 2, 2)]


def library(*, deterministic: bool):
    def with_argument(q, k, v, causal=False, deterministic=False):
        return "deterministic" if deterministic else "as fast as it can"

    def without(q, k, v, causal=False):
        return "as fast as it can"

    function = with_argument if deterministic else without
    return SimpleNamespace(flash_attn_func=function, flash_attn_varlen_func=function)


@pytest.mark.parametrize(
    ("libraries", "fastest", "repeatable"),
    [
        ({}, "torch, cuDNN first", "torch"),
        ({"flash_attn": True}, "torch, cuDNN first", "flash-attn 2"),
        ({"flash_attn": False}, "torch, cuDNN first", "torch"),
        ({"flash_attn_interface": True}, "flash-attn 3", "flash-attn 3"),
        ({"flash_attn_interface": False, "flash_attn": True}, "flash-attn 3", "flash-attn 2"),
    ],
)
def test_a_run_that_must_repeat_gets_a_kernel_that_can(on_hopper, libraries, fastest, repeatable):
    """cuDNN's backward pass cannot, nor can old releases of flash-attn."""
    on_hopper({name: library(deterministic=can) for name, can in libraries.items()})
    assert attention.choose(*tensors())[0] == fastest
    with deterministic_kernels(True):
        assert attention.choose(*tensors())[0] == repeatable
    assert attention.choose(*tensors())[0] == fastest


def test_flash_attn_is_told_to_repeat_where_it_must_only(on_hopper):
    on_hopper({"flash_attn_interface": library(deterministic=True)})
    q, k, v = tensors()
    assert attention.KERNELS["flash-attn 3"](q, k, v) == "as fast as it can"
    with deterministic_kernels(True):
        assert attention.KERNELS["flash-attn 3"](q, k, v) == "deterministic"


def test_documents_get_a_kernel_that_repeats_too(on_hopper):
    on_hopper({name: library(deterministic=name == "flash_attn") for name in ("flash_attn_interface", "flash_attn")})
    assert document_mask.choose(*tensors())[0] == "flash-attn 3"
    with deterministic_kernels(True):
        assert document_mask.choose(*tensors())[0] == "flash-attn 2"
    assert document_mask.choose(*tensors(torch.float32))[0] == "torch, masked"


def test_torch_refuses_what_does_not_repeat_within_the_block_only():
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()


def test_workspaces_of_cublas_are_set_and_others_are_refused(monkeypatch):
    monkeypatch.delenv(CUBLAS_WORKSPACES, raising=False)
    with deterministic_kernels(True):
        assert os.environ[CUBLAS_WORKSPACES] == ":4096:8"
    monkeypatch.setenv(CUBLAS_WORKSPACES, ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 in the environment: .* :4096:8 or :16:8"):
        deterministic_kernels(True).__enter__()


def test_sums_of_half_precision_are_not_rounded_on_their_way(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    try:
        sum_half_precision_in_fp32()
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def losses(recipe, *overrides) -> list[float]:
    code, output = finish(launch(recipe, 1, *overrides))
    assert code == 0, output
    return [metrics["loss"] for metrics in read_metrics(RunDirectory(recipe.parent / "run", is_writer=False).metrics)]


def test_a_run_that_must_repeat_refuses_no_operation_of_a_step(tmp_path, monkeypatch):
    """With evaluation and a document mask; on a CPU all results repeat, so they are those of any other run."""
    monkeypatch.delenv(CUBLAS_WORKSPACES, raising=False)
    found = []
    for deterministic in (True, False):
        folder = tmp_path / str(deterministic)
        folder.mkdir()
        recipe = write_recipe(
            folder,
            data=dict(document_mask=True),
            train=dict(steps=2, evaluate_every=2, deterministic=deterministic),
            run=dict(dir=str(folder / "run")),
        )
        found.append(losses(recipe))
    assert found[0] == found[1] and len(found[0]) == 2
    monkeypatch.setenv(CUBLAS_WORKSPACES, ":0:0")
    recipe = tmp_path / "True" / "recipe.toml"
    code, output = finish(launch(recipe, 1, f"--run.dir={tmp_path / 'refused'}"))
    assert code == 2 and "CUBLAS_WORKSPACE_CONFIG=:0:0" in output and "Traceback" not in output, output
