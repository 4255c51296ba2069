"""What metrics.jsonl says of a run."""

import json
import re
from pathlib import Path

import pytest

from megagap.config import load_recipe
from tests.recipes import write_recipe, write_tokens
from tests.training_run import train_recipe


def test_losses_of_sources_average_to_the_loss(workers, tmp_path):
    """Sequences are equally long, so the mean over sources is weighted by how many of each the step drew."""
    from megagap.training.datasets import training_data

    recipe = write_recipe(tmp_path, train=dict(steps=4))
    metrics = workers.run(4, train_recipe, recipe, ["parallel.pp=2"])[0]
    data = training_data(load_recipe(recipe))
    for m in metrics:
        drawn = data.source_indices(8 * (m["step"] - 1), 8).tolist()
        names = [("fr", "en")[i] for i in drawn]
        assert {key for key in m if key.startswith("loss/")} == {f"loss/{name}" for name in names}
        assert m["loss"] == pytest.approx(sum(m[f"loss/{name}"] for name in names) / 8, rel=1e-5)


def test_every_step_has_the_keys_of_the_contract(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=3, evaluate_every=2, evaluate_samples=3))
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    keys = {"step", "consumed_samples", "consumed_tokens", "loss", "grad_norm", "lr", "skipped"}
    keys |= {"step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes"}
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert keys <= m.keys()
        assert m["consumed_tokens"] == 32 * m["consumed_samples"] == 32 * 8 * m["step"]
        assert m["mfu"] is None, "the peak of a CPU is unknown"
        assert ("validation_loss" in m) == (m["step"] in (2, 3))


def test_the_page_on_metrics_lists_every_key_and_no_other(workers, tmp_path, tokenizer_folder):
    train = {"steps": 2, "evaluate_every": 2, "evaluate_samples": 2, "evaluate_first": True, "z_loss": 1e-4}
    train |= {"precision": "fp16-mixed", "evaluate_tasks_every": 2}
    guard = {"spikes": "report", "hash_every": 1, "replay_every": 2}
    # Of a byte-level BPE, so that the bytes of its tokens are known.
    data = {"tokenizer": str(tokenizer_folder), "tasks": ["fr.jsonl", "en.jsonl"]}
    (tmp_path / "fr.jsonl").write_text('{"question": "Who?", "choices": ["I", "you"], "answer": 0}\n')
    (tmp_path / "en.jsonl").write_text('{"prompt": "Who?", "completion": "I"}\n')
    for seed, name in enumerate(("fr", "en")):
        write_tokens(tmp_path / f"{name}_text_document", seed, vocabulary=299)
    recipe = write_recipe(tmp_path, train=train, data=data, guard=guard, run={"insight_every": 2})
    metrics = workers.run(2, train_recipe, recipe, ["run.slow_ranks_every=1", "train.steps=5"])[0]
    written = {re.sub("/(fr|en)$", "/NAME", key) for record in metrics for key in record}
    written = {re.sub(r"/(embed_tokens|layers\.\d+(\.norms)?|norm|lm_head)$", "/PART", key) for key in written}
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    assert written == set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))


def test_mfu_follows_from_the_formula_and_peak_in_environment_json(workers, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 3})
    metrics = workers.run(2, train_with_a_peak, recipe)[0]
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    mfu = environment["mfu"]
    assert (
        mfu["peak_tflops"] == 2.0 and mfu["peak_of"] == "data sheet of a known device: dense matrix products in float32"
    )

    # The formula of the page, from the shapes: all matrices but the embedding, and the attention square.
    model = load_recipe(recipe).model
    heads, pairs = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    layer = model.hidden_size * (2 * heads + 2 * pairs + 3 * model.intermediate_size)
    weights = model.num_hidden_layers * layer + model.hidden_size * model.vocab_size
    per_token = 6 * weights + 12 * model.num_hidden_layers * heads * 32
    assert mfu["flops_per_token"]["by_sequence_length"] == {"32": per_token}
    for m in metrics:
        tflops = per_token * m["tokens_per_second"] / environment["processes"] / 1e12
        assert m["tflops_per_device"] == pytest.approx(tflops) and m["mfu"] == pytest.approx(tflops / 2.0)


def peak_of_fp32(device, dtype):
    return {"torch.float32": 2.0}[str(dtype)]


def train_with_a_peak(rank, ranks, recipe):
    """On a device whose peak is known."""
    from unittest.mock import patch

    from megagap.observe import run_directory
    from megagap.training import recorder

    with (
        patch.object(run_directory, "peak_tflops", peak_of_fp32),
        patch.object(recorder, "peak_tflops", peak_of_fp32),
        patch("torch.cuda.get_device_name", lambda device: "a known device"),
    ):
        return train_recipe(rank, ranks, recipe, [])


def test_the_peak_of_a_cpu_is_said_to_be_unknown(workers, tmp_path):
    workers.run(1, train_recipe, write_recipe(tmp_path, train={"steps": 2}), [])
    mfu = json.loads((tmp_path / "run/environment.json").read_text())["mfu"]
    assert mfu["peak_tflops"] is None and mfu["peak_of"] is None and "tflops_per_device / peak_tflops" in mfu["formula"]
