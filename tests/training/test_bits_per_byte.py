"""Evaluations during training give bits per byte: exact, in every layout, or not at all."""

import json
import math

import pytest

from megagap.checkpoint import load_model
from megagap.data.sources import WHOLE, TokenSource
from megagap.data.text_bytes import text_bytes
from megagap.inference.evaluation import evaluate_source
from megagap.preprocess import preprocess
from megagap.timeline import Source
from megagap.tokenizer import load_tokenizer
from tests.recipes import write_recipe, write_tokens
from tests.training_run import train_recipe

LENGTH = 32


@pytest.fixture
def recipe(tmp_path, texts, tokenizer_folder):
    """Validation on a source with a manifest and on one without."""
    lines = [text + str(i) for i in range(12) for text in texts]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    preprocess([tmp_path / "held.jsonl"], str(tmp_path / "held"), str(tokenizer_folder), append_eod=True)
    vocabulary = load_tokenizer(tokenizer_folder).vocab_size
    for seed, name in enumerate(("fr", "en", "bare")):
        write_tokens(tmp_path / f"{name}_text_document", seed, vocabulary=vocabulary)
    return write_recipe(
        tmp_path,
        model={"vocab_size": vocabulary},
        data={"validation": [{"path": "held_text_document"}, {"path": "bare_text_document"}]},
        train={"steps": 2, "evaluate_every": 2, "evaluate_samples": 10_000},
    )


@pytest.mark.parametrize("mask", [False, True], ids=["", "document mask"])
def test_they_are_those_of_evaluate_on_the_same_windows_in_every_layout(workers, tmp_path, recipe, mask):
    settings = [f"data.document_mask={str(mask).lower()}"]
    (one,) = workers.run(1, train_recipe, recipe, settings)
    prefix = str(tmp_path / "held_text_document")
    source = TokenSource(Source("held", (prefix,)), "100,0,0", WHOLE)
    expected = evaluate_source(
        load_model(tmp_path / "run/checkpoints/step_00000002"),
        source,
        LENGTH,
        batch_tokens=8 * LENGTH,
        max_tokens=source.window_count(LENGTH) * LENGTH,
        document_mask=mask,
        text_bytes=text_bytes([prefix], None),
    )
    assert expected.loss == pytest.approx(one[-1]["validation_loss/held"], rel=1e-6)
    assert one[-1]["validation_bpb/held"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    four = workers.run(4, train_recipe, recipe, [*settings, "parallel.tp=2", f"run.dir={tmp_path / 'four'}"])[0]
    assert four[-1]["validation_bpb/held"] == pytest.approx(one[-1]["validation_bpb/held"], rel=1e-5)


def test_a_source_whose_bytes_are_unknown_has_none_and_the_log_says_so_once(workers, tmp_path, recipe):
    (metrics,) = workers.run(1, train_recipe, recipe, ["train.evaluate_every=1"])
    assert all({k for k in m if "bpb" in k} == {"validation_bpb/held"} for m in metrics)
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert log.count("bits per byte of bare are not known, so validation_bpb/bare is left out: no tokenizer is") == 1
    assert log.count("bits per byte of") == 1


def test_a_uniform_model_needs_as_many_bits_per_byte_as_a_tokens_choice_takes(workers, tmp_path, recipe):
    """Before the first step, with weights near zero: log2(vocabulary) bits per token."""
    settings = ["train.evaluate_first=true", "model.initializer_range=1e-6", "train.steps=2"]
    (metrics,) = workers.run(1, train_recipe, recipe, settings)
    manifest = json.loads((tmp_path / "held_text_document.json").read_text())
    per_token = math.log2(manifest["tokenizer"]["vocab_size"]) * manifest["tokens"] / manifest["text_bytes"]
    # All but the last, shorter window, and the first token.
    assert metrics[0]["validation_bpb/held"] == pytest.approx(per_token, rel=0.05)
