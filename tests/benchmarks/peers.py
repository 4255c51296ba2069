"""Times the training step of a recipe's model in other implementations, on one GPU, in tokens per second.

    PYTHONPATH=. python tests/benchmarks/peers.py examples/recipes/gaperon-1b-one-gpu.toml
    PYTHONPATH=. python tests/benchmarks/peers.py recipe.toml --arms transformers liger --output runs/peers

Arms: ``transformers`` (SDPA attention), ``liger`` (the same with Liger-Kernel's operations, where it is installed),
``compiled`` (transformers under torch.compile) and ``megatron`` (megatron-core's model without Transformer Engine, its
attention by SDPA, too: its own keeps s × s matrices). All train in pure bf16 with torch's fused AdamW, clipping by the
global norm: less memory traffic than megagap's fp32 masters. Compare with tools/benchmark_mfu.py on the same machine.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from megagap.checkpoint import find_model
from megagap.config import Settings, load_recipe
from megagap.model.flops import flops_per_token
from megagap.observe.utilisation import peak_tflops
from megagap.terminal.console import Console
from tests.benchmarks.kernels import hardware, installed
from tests.huggingface import reference_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--arms", nargs="+", default=["transformers", "liger", "megatron"], choices=list(ARMS))
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, help="folder for peers.json")
    options = parser.parse_args()
    settings = load_recipe(options.recipe, [], 1, needs_data=False, find_model=find_model)
    device = torch.device("cuda")
    flops = flops_per_token(settings.model, settings.train.sequence_length)
    peak = peak_tflops(device, torch.bfloat16)
    table = Table("arm", "tokens per second", "MFU (full)", "MFU (causal)", "peak GB")
    report = {}
    for arm in options.arms:
        try:
            seconds = time_steps(arm, settings, device, options.warmup, options.steps)
        except Exception as error:  # one peer's error must not hide the others' times
            print(f"note: {arm} is left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        tokens = settings.train.micro_batch_size * settings.train.sequence_length / statistics.median(seconds)
        shares = [None if peak is None else count * tokens / peak / 1e12 for count in (flops.full, flops.causal)]
        memory = torch.cuda.max_memory_allocated() / 1e9
        shown = ["" if share is None else f"{share:.1%}" for share in shares]
        table.add_row(arm, f"{tokens:,.0f}", *shown, f"{memory:.1f}")
        report[arm] = {"tokens_per_second": tokens, "step_seconds": seconds, "mfu": shares, "memory_gb": memory}
    Console().print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "peers.json").write_text(json.dumps({"arms": report, "hardware": hardware(device)}, indent=2))


def transformers_model(settings: Settings, device: torch.device) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    config = reference_config(settings.model)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).train()


def liger_model(settings: Settings, device: torch.device) -> torch.nn.Module:
    liger = installed("liger_kernel.transformers")
    if liger is None:
        raise ImportError("liger-kernel is not installed")
    model = transformers_model(settings, device)
    liger.apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True)
    return model


def compiled_model(settings: Settings, device: torch.device) -> torch.nn.Module:
    return torch.compile(transformers_model(settings, device), dynamic=False)  # type: ignore[return-value]


def megatron_model(settings: Settings, device: torch.device) -> torch.nn.Module:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        if device.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = settings.model
    config = TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    gpt = GPTModel(
        config,
        spec,
        vocab_size=model.vocab_size,
        max_sequence_length=settings.train.sequence_length,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=model.tie_word_embeddings,
    )
    return MegatronLoss(gpt.to(device, torch.bfloat16))


class SdpaAttention(torch.nn.Module):
    """In place of megatron-core's ``DotProductAttention``: [s, b, heads, d] -> [s, b, heads · d]."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> Any:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class MegatronLoss(torch.nn.Module):
    """megatron-core's model with the interface of a model of transformers."""

    def __init__(self, gpt: torch.nn.Module) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        losses = self.gpt(input_ids, positions, None, labels=labels)
        return SimpleNamespace(loss=losses.mean())


ARMS = {
    "transformers": transformers_model,
    "liger": liger_model,
    "compiled": compiled_model,
    "megatron": megatron_model,
}


def time_steps(arm: str, settings: Settings, device: torch.device, warmup: int, steps: int) -> list[float]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = ARMS[arm](settings, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    shape = (settings.train.micro_batch_size, settings.train.sequence_length)
    tokens = torch.randint(settings.model.vocab_size, shape, device=device)
    seconds = []
    for step in range(warmup + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if step >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    main()
