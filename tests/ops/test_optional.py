"""flash-attn and apex are called with the right arguments. They need a GPU: here, stand-ins with their signatures."""

import importlib
import types

import pytest
import torch
import torch.nn.functional as F

from megagap.ops import attention, compiled, optional, rms_norm


@pytest.fixture
def library(monkeypatch):
    """Pretends that tensors are on a GPU for which a library of this name is installed."""

    def install(operation, name, **functions):
        module = types.SimpleNamespace(**functions)
        monkeypatch.setattr(compiled, "AVAILABLE", False)
        # By import, for the package's attribute of that name is the function.
        file = importlib.import_module(f"megagap.ops.{operation}")
        monkeypatch.setattr(file, "gpu_library", lambda wanted, *_: module if wanted == name else None)
        return file

    return install


def test_nothing_is_imported_for_tensors_on_cpu():
    assert optional.gpu_library("no_such_module", torch.zeros(1, dtype=torch.bfloat16)) is None


def test_a_library_that_is_not_installed_is_none():
    assert optional._import("no_such_module") is None


@pytest.mark.parametrize("queries", [1, 5])
def test_flash_attention_gets_unexpanded_heads_and_the_causal_flag(library, queries):
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append((q.shape, k.shape, causal))
        return F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    q, k, v = torch.randn(2, queries, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    expected = attention(q, k, v)
    file = library("attention", "flash_attn", flash_attn_func=flash_attn_func)
    torch.testing.assert_close(file.KERNELS["flash-attn 2"](q, k, v), expected)
    assert calls == [(q.shape, k.shape, queries == 5)]


def test_apex_rms_norm_gets_the_normalized_shape(library):
    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        return F.rms_norm(input, normalized_shape, weight, eps)

    x, weight = torch.randn(3, 8), torch.rand(8)
    expected = rms_norm(x, weight, 1e-3)
    library("rms_norm", "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected)
