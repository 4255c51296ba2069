"""The loss of a model on token files, against plain ``transformers``."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megagap.checkpoint import load_model
from megagap.checkpoint.huggingface import export
from megagap.checkpoint.huggingface_import import load_hugging_face_model
from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.data.sources import WHOLE, TokenSource
from megagap.errors import DataError
from megagap.inference.evaluation import SourceLoss, evaluate_source, find_model_files
from megagap.timeline import Source
from tests.huggingface import reference_model
from tests.models import tiny_model
from tests.recipes import VOCABULARY, write_recipe, write_tokens
from tests.training_run import train_recipe

LENGTH = 32


def source_of(prefix: Path, name: str = "fr", vocabulary: int = VOCABULARY) -> TokenSource:
    return TokenSource(Source(name, (str(prefix),)), "100,0,0", WHOLE, vocabulary)


def reference_losses(folder: Path, tokens: torch.Tensor, length: int = LENGTH) -> torch.Tensor:
    """Of each token but the first, by ``transformers``, window by window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            window = tokens[start : start + length + 1]
            losses.append(F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none"))
    return torch.cat(losses).double()


LAYOUTS = [
    (4, ["parallel.tp=2", "parallel.pp=2"], {"tie_word_embeddings": True}),
    (2, ["parallel.pp=2"], {}),
    (2, [], {"norm_gain_scale": 20.0}),  # data-parallel
    (2, ["parallel.tp=2"], {"attention_bias": True}),
]


@pytest.mark.parametrize(
    ("ranks", "layout", "model"), LAYOUTS, ids=["tp2 pp2 tied", "pp2", "dp2 gain 20", "tp2 biases"]
)
def test_the_loss_of_any_layouts_checkpoint_is_that_of_transformers_and_of_the_run(
    workers, tmp_path, ranks, layout, model
):
    write_tokens(tmp_path / "held_text_document", seed=2, documents=8)
    data = {"validation": [{"path": "held_text_document"}]}
    train = {"steps": 2, "evaluate_every": 2, "evaluate_samples": 10_000}
    recipe = write_recipe(tmp_path, model=model, data=data, train=train)
    metrics = workers.run(ranks, train_recipe, recipe, layout)[0]
    files = find_model_files(tmp_path / "run")
    assert (files.step, files.default_length()) == (2, LENGTH)
    export(files.path, tmp_path / "hf")

    source = source_of(tmp_path / "held_text_document")
    tokens = torch.from_numpy(source.read(0, source.token_count))
    losses = reference_losses(tmp_path / "hf", tokens)
    assert (len(tokens) - 1) % LENGTH, "the last window is a shorter one"
    ours = evaluate_source(load_model(tmp_path / "run"), source, LENGTH, batch_tokens=256)
    theirs = evaluate_source(load_hugging_face_model(tmp_path / "hf"), source, LENGTH, batch_tokens=256)
    assert ours.tokens == theirs.tokens == len(losses) == len(tokens) - 1
    assert ours.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert ours.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)

    # The run evaluates whole windows only.
    whole = len(losses) // LENGTH * LENGTH
    part = evaluate_source(load_model(tmp_path / "run"), source, LENGTH, batch_tokens=256, max_tokens=whole)
    assert (part.tokens, part.share_read) == (whole, whole / len(losses))
    assert part.loss == pytest.approx(metrics[-1]["validation_loss/held"], rel=1e-5)
    assert part.loss == pytest.approx(float(losses[:whole].mean()), abs=1e-5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random model and a source."""
    folder = tmp_path_factory.mktemp("evaluation")
    reference_model(tiny_model()).save_pretrained(folder / "hf")
    write_tokens(folder / "text", seed=1, documents=4, vocabulary=61)
    return folder


@pytest.mark.parametrize("length", [3, 16, 64])
def test_every_token_but_the_first_is_predicted_once_whatever_the_batches(model_folder, length):
    model, source = load_hugging_face_model(model_folder / "hf"), source_of(model_folder / "text", vocabulary=61)
    losses = reference_losses(model_folder / "hf", torch.from_numpy(source.read(0, source.token_count)), length)
    for batch_tokens in (1, 3 * length, 10**6):
        seen = []
        result = evaluate_source(model, source, length, batch_tokens=batch_tokens, progress=seen.append)
        assert (result.tokens, sum(seen), result.share_read) == (len(losses), len(losses), 1)
        assert max(seen) <= max(batch_tokens, length)
        assert result.loss == pytest.approx(float(losses.mean()), abs=1e-5)


@pytest.mark.parametrize("most", [1, 31, 32, 33, 10**9])
def test_max_tokens_are_the_first_ones(model_folder, most):
    model, source = load_hugging_face_model(model_folder / "hf"), source_of(model_folder / "text", vocabulary=61)
    losses = reference_losses(model_folder / "hf", torch.from_numpy(source.read(0, source.token_count)))
    result = evaluate_source(model, source, LENGTH, batch_tokens=64, max_tokens=most)
    assert (result.tokens, result.share_read) == (len(losses[:most]), len(losses[:most]) / len(losses))
    assert result.loss == pytest.approx(float(losses[:most].mean()), abs=1e-5)


def test_with_a_document_mask_each_document_of_a_window_is_predicted_by_itself(model_folder):
    prefix = model_folder / "text"
    documents = [torch.from_numpy(d.astype(np.int64)) for d in IndexedDataset(prefix)]
    # A document is cut where a window starts; the first token of the next window is the last target of this one.
    model = AutoModelForCausalLM.from_pretrained(model_folder / "hf", dtype=torch.float32).eval()
    losses, place = [], 0
    for document in documents:
        first = 0
        while first + 1 < len(document):
            last = min(len(document) - 1, first + LENGTH - (place + first) % LENGTH)
            with torch.no_grad():
                logits = model(document[None, first:last]).logits[0]
            losses += F.cross_entropy(logits, document[first + 1 : last + 1], reduction="none").tolist()
            first = last
        place += len(document)
    ours = evaluate_source(
        load_hugging_face_model(model_folder / "hf"),
        source_of(prefix, vocabulary=61),
        LENGTH,
        batch_tokens=100,
        document_mask=True,
    )
    assert ours.tokens == len(losses) == sum(len(document) - 1 for document in documents)
    assert ours.loss == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_source_without_anything_to_predict_is_refused(model_folder, tmp_path):
    model = load_hugging_face_model(model_folder / "hf")
    for name, documents, message in (
        ("empty", [], "has no tokens, none to predict"),
        ("one", [[3]], "has 1 token, none to predict"),
        ("ones", [[3], [4], [5]], "no document in what was read has two tokens"),
    ):
        with IndexedDatasetWriter(tmp_path / name, "uint16") as writer:
            for document in documents:
                writer.add_document(document)
        with pytest.raises(DataError, match=message):
            source = source_of(tmp_path / name, name, vocabulary=61)
            evaluate_source(model, source, LENGTH, batch_tokens=64, document_mask=True)


def test_what_is_not_finite_is_none_rather_than_a_number():
    numbers = [(r.loss, r.perplexity, r.bits_per_byte) for r in (SourceLoss(math.nan, 3, 3, 1.0),)]
    assert numbers == [(None, None, None)]
    huge = SourceLoss(3000.0, 3, 0, 1.0)
    assert (huge.loss, huge.perplexity, huge.bits_per_byte) == (1000.0, None, None)
