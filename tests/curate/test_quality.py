"""The quality classifier: labels, training, calibration, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datatrove", reason="pip install megagap[curate]")
pytest.importorskip("transformers", reason="pip install megagap[curate]")

from datatrove.data import Document
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megagap.curate.quality.calibrate import expected_calibration_error, fit_temperatures
from megagap.curate.quality.degrade import DEGRADATIONS, example_labels
from megagap.curate.quality.encoder import load_encoder
from megagap.curate.quality.filter import QualityFilter
from megagap.curate.quality.labels import CRITERIA, HEADS, Example, read_labels, require_classes, split
from megagap.curate.quality.model import QualityModel, load_quality_model, save_quality_model, softmax
from megagap.curate.quality.train import Recipe, Trained, recalibrate, train_encoder, train_linear
from megagap.errors import DataError
from tests.token_files import FRENCH


def examples(count: int = 120) -> list[Example]:
    """Easy ones: texts of low quality are in capitals."""
    words = FRENCH.split()
    found = []
    for i in range(count):
        text = " ".join(words[(7 * i) % 100 :][:30])
        low = i % 2 == 0
        found.append(Example(text.upper() if low else text, (0 if low else 2,) * len(HEADS), f"document {i // 2}"))
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small only wait for each other on several, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def linear() -> Trained:
    return train_linear(examples(), seed=0)


@pytest.fixture(scope="module")
def encoder() -> Trained:
    return train_encoder(examples(), seed=0, max_length=32, recipe=Recipe(epochs=15, lr=2e-3, batch_size=16))


@pytest.mark.parametrize("kind", ["linear", "encoder"])
def test_a_classifier_learns_what_can_be_learnt_and_is_the_same_from_its_folder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trained: Trained = request.getfixturevalue(kind)
    assert trained.held_out["overall"].accuracy > 0.9 > trained.held_out["overall"].majority
    save_quality_model(trained.model, tmp_path / "model")
    texts = [example.text for example in examples(8)]
    again = load_quality_model(tmp_path / "model")
    assert again.record == trained.model.record
    # Alone and beside longer texts, which pad it.
    expected = trained.model.probabilities(texts, batch_size=8)
    np.testing.assert_allclose(again.probabilities(texts, batch_size=1), expected, atol=1e-5)


def test_the_filter_drops_what_is_most_probably_low_and_notes_every_score(linear: Trained, tmp_path: Path) -> None:
    save_quality_model(linear.model, tmp_path / "model")
    documents = [Document(example.text, str(i)) for i, example in enumerate(examples(10))]
    kept = list(QualityFilter(str(tmp_path / "model"), ["low"], batch_size=4).run(iter(documents)))
    assert [document.id for document in kept] == ["1", "3", "5", "7", "9"]
    assert {document.metadata["quality"] for document in documents} == {"low", "high"}
    assert documents[0].metadata["quality_scores"].keys() == set(HEADS)
    assert documents[0].metadata["quality_scores"]["overall"] < 0.5 < documents[1].metadata["quality_scores"]["overall"]


@pytest.mark.parametrize("kind", ["linear", "encoder"])
def test_layout_alone_changes_no_score(kind: str, request: pytest.FixtureRequest) -> None:
    """Example labels have passages in one line: line ends, which documents are full of, must not tell them apart."""
    model = request.getfixturevalue(kind).model
    text = " ".join(FRENCH.split())
    scores = model.probabilities([text, text.replace(" ", "\n"), f"  {text}\n\n"])
    np.testing.assert_allclose(scores[1:], scores[[0, 0]], atol=1e-6)


def test_a_long_text_is_read_at_its_start_and_its_end(encoder: Trained) -> None:
    text = " ".join(f"mot{i}" for i in range(500))
    (ids,) = encoder.model.network.encode([text])
    tokens = encoder.model.network.tokenizer.decode(ids)
    assert len(ids) == 32 and "mot0" in tokens and "mot499" in tokens and "mot250" not in tokens


# --------------------------------------------------------------------------------------------------------- calibration


def test_a_temperature_that_logits_were_multiplied_by_is_found_and_the_error_falls() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(4000, len(HEADS), 3)).astype(np.float32)
    labels = np.array([[draw.choice(3, p=p / p.sum()) for p in row] for row in softmax(logits).astype(np.float64)])
    temperatures = fit_temperatures(3 * logits, labels)
    assert temperatures == pytest.approx([3] * len(HEADS), rel=0.15)
    sure = expected_calibration_error(softmax(3 * logits[:, 0]), labels[:, 0])
    calibrated = expected_calibration_error(softmax(3 * logits[:, 0] / np.float32(temperatures[0])), labels[:, 0])
    assert calibrated < 0.05 < sure


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    probabilities = np.array([[0.75, 0.25, 0.0]] * 4, np.float32)
    assert expected_calibration_error(probabilities, np.array([0, 0, 0, 1])) == pytest.approx(0)
    assert expected_calibration_error(probabilities, np.array([1, 1, 1, 1])) == pytest.approx(0.75)


# -------------------------------------------------------------------------------------------------------------- labels


def line(**changes: object) -> str:
    return json.dumps({"text": "some text", "labels": dict.fromkeys(CRITERIA, "high")} | changes) + "\n"


def test_the_overall_label_is_the_rounded_mean_of_the_criteria_unless_given(tmp_path: Path) -> None:
    mixed = dict.fromkeys(CRITERIA, "low") | {"style": "high", "depth": "high"}
    (tmp_path / "labels.jsonl").write_text(line(labels=mixed) + line(labels=mixed | {"overall": "high"}))
    assert [example.labels[-1] for example in read_labels(tmp_path / "labels.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no examples"),
        (line() + "{\n", "line 2 is not JSON"),
        (line(labels="high"), 'must be an object with "text" and "labels"'),
        (line(labels={"style": "good"}), "the label style = 'good' is unknown"),
        (line(labels={"style": "low"}), "lacks the label accuracy, clarity, depth, usefulness"),
        (line(text=" "), "line 1 has an empty text"),
    ],
)
def test_a_file_of_labels_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "labels.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "labels.jsonl")


def test_texts_of_one_document_are_on_one_side_of_the_split() -> None:
    parts = split(examples(400))
    documents = [{example.document for example in part} for part in parts]
    assert not documents[0] & documents[1] | documents[0] & documents[2] | documents[1] & documents[2]
    assert sum(map(len, parts)) == 400 and min(map(len, parts)) > 10


def test_labels_of_one_class_are_refused() -> None:
    same = [Example(f"text {i}", (2,) * len(HEADS), str(i)) for i in range(100)]
    with pytest.raises(DataError, match=r"have the label accuracy = high(.|\n)*add texts of another"):
        train_linear(same, seed=0)
    with pytest.raises(DataError, match="the label accuracy = high"):
        require_classes(same)


def test_a_document_may_be_called_0(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text("".join(line(text=f"text {i}", document=0) for i in range(3)))
    assert [example.document for example in read_labels(tmp_path / "labels.jsonl")] == ["0"] * 3


def test_other_labels_calibrate_a_classifier_on_some_documents_and_measure_it_on_others(linear: Trained) -> None:
    model = QualityModel(linear.model.record, linear.model.network)
    others = examples(400)
    held_out = split(others)[2]
    trained = recalibrate(model, others)
    assert trained.model.record.report["held_out"]["texts"] == len(held_out)
    probabilities = trained.model.probabilities([example.text for example in held_out])
    labels = [example.labels[-1] for example in held_out]
    assert trained.held_out["overall"].accuracy == (probabilities[:, -1].argmax(-1) == labels).mean()
    with pytest.raises(DataError, match="have the label accuracy = low"):
        recalibrate(model, [example for example in others if example.labels[0] == 0])


def test_too_few_documents_to_hold_out_are_refused() -> None:
    with pytest.raises(DataError, match="come from 2 documents, too few"):
        split(examples(4))


def test_example_labels_follow_the_known_damage_and_depend_on_the_seed_only() -> None:
    documents = [(FRENCH.replace("\n", " ") * 2, f"document {i}", "fables") for i in range(60)]
    made = list(example_labels(documents, seed=1))
    assert made == list(example_labels(documents, seed=1)) != list(example_labels(documents, seed=2))
    assert {str(example["made_by"]) for example in made} == DEGRADATIONS.keys()
    for example in made:
        assert example["labels"]["overall"] == DEGRADATIONS[str(example["made_by"])].overall
        assert (example["text"] in documents[0][0]) == (example["made_by"] == "as it is")


# ------------------------------------------------------------------------------------------------- folders of encoders


def test_a_model_that_reads_from_left_to_right_is_no_encoder(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"is no encoder: its model_type is 'llama'(.|\n)*fetch the files of https://"):
        load_encoder(tmp_path, 32)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"is no encoder: it has no config\.json(.|\n)*fetch the files"),
        ({"config.json": "{}"}, "is no encoder that transformers knows"),
        ({"config.json": '{"model_type": "xlm-roberta"}'}, "has no weights as safetensors"),
    ],
)
def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_encoder(tmp_path, 32)


@pytest.mark.parametrize("damage", ["a layer is missing", "another tokenizer"])
def test_an_encoder_whose_files_do_not_belong_together_is_refused(
    encoder: Trained, tmp_path: Path, damage: str
) -> None:
    save_quality_model(encoder.model, tmp_path)
    if damage == "another tokenizer":
        config = json.loads((tmp_path / "config.json").read_text())
        weights = load_file(tmp_path / "model.safetensors")
        name = "roberta.embeddings.word_embeddings.weight"
        save_file(weights | {name: weights[name][:99].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
        message = "ids, the encoder 99: they do not belong together"
    else:
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "encoder.layer.1." not in name}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        message = r"lack roberta\.encoder\.layer\.1\..* \(16 are missing\)"
    with pytest.raises(DataError, match=message):
        load_encoder(tmp_path, 32)


def test_a_folder_that_is_no_classifier_or_a_damaged_one_is_refused(linear: Trained, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no quality\.json\n.*train-quality"):
        load_quality_model(tmp_path)
    save_quality_model(linear.model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"cannot load .*model\.safetensors"):
        load_quality_model(tmp_path)
    (tmp_path / "quality.json").write_text('{"kind": "forest"}')
    with pytest.raises(DataError, match=r"quality\.json is damaged"):
        load_quality_model(tmp_path)
