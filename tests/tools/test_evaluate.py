"""``tools/evaluate.py`` as users call it."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megagap.checkpoint.huggingface_import import import_model
from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.errors import MegagapError
from megagap.preprocess import preprocess
from megagap.preprocess.bpe import train_tokenizer
from tests.huggingface import reference_model
from tests.models import tiny_model
from tests.warm_start import python
from tools.evaluate import main

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
TEXTS = ["the quick brown fox, le vif renard brun", "Déjà vu ? 日本語 🙂", "x = [y ** 2 for y in range(1024)]\n\n"] * 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random model with a tokenizer, as Hugging Face's and as a checkpoint, and texts that are encoded with it."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, texts in (("fr", TEXTS), ("en", TEXTS[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([folder / "fr.jsonl"], folder / "hf", 300)
    reference_model(tiny_model(vocab_size=300)).save_pretrained(folder / "hf")
    for name in ("fr", "en"):
        preprocess([folder / f"{name}.jsonl"], str(folder / name), str(folder / "hf"), append_eod=True)
    import_model(folder / "hf", folder / "checkpoint")
    return folder


@pytest.fixture
def fr(made):
    return str(made / "fr_text_document")


@pytest.fixture
def en(made):
    return str(made / "en_text_document")


def evaluate(capsys, *arguments):
    """The JSON that is printed, and what stands on standard error."""
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    output, errors = capsys.readouterr()
    assert output.count("\n") == 1
    return json.loads(output, parse_constant=pytest.fail), errors


def write(prefix, *documents):
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def test_folder_and_checkpoint_give_the_numbers_of_transformers_and_of_the_raw_text(capsys, made, fr):
    tokens = torch.from_numpy(IndexedDataset(fr).tokens.astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 64):  # max_position_embeddings
            window = tokens[start : start + 65]
            losses += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none").tolist()
    # The first token, "the" or a part of it, is not predicted.
    first = json.loads((made / "hf/tokenizer.json").read_text())["model"]["vocab"]
    unpredicted = next(len(token) for token, i in first.items() if i == tokens[0])
    size = sum(len(text.encode()) for text in TEXTS) - unpredicted
    for path in (made / "hf", made / "checkpoint"):
        found, _ = evaluate(capsys, path, "--data", fr)
        source = found["sources"]["fr"]
        assert source["tokens"] == len(losses) == len(tokens) - 1
        assert source["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert source["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        assert source["bytes"] == size and source["bytes_from"] == f"the tokenizer {made / 'hf'}"
        assert source["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-6)
        assert (found["sequence_length"], found["dtype"], found["document_mask"]) == (64, "float32", False)


def test_only_json_is_on_standard_output_and_progress_on_standard_error(made, fr):
    done = subprocess.run(
        [python(), TOOL, made / "checkpoint", "--data", fr, "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["sources"].keys() == {"fr"}
    assert "token/s" in done.stderr


def test_the_table_shows_each_source(capsys, made, fr, en):
    main([str(made / "hf"), "--data", fr, en, "--sequence-length", "8", "--max-tokens", "20", "--name", "one", "two"])
    table = capsys.readouterr().out
    assert "windows of 8 tokens, float32" in table
    for name in ("one", "two"):
        (line,) = [line for line in table.splitlines() if f" {name} " in line]
        assert " 20 " in line and " first " in line


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_pair_is_named_by_its_prefix_or_a_file(capsys, made, fr, ending):
    assert evaluate(capsys, made / "hf", "--data", fr + ending)[0]["sources"].keys() == {"fr"}


def test_the_files_of_a_pair_that_a_shell_lists_are_one_source(capsys, made, fr, en):
    listed = sorted(map(str, made.glob("*_text_document.*")))
    assert len(listed) == 8
    assert [*evaluate(capsys, made / "hf", "--data", *listed)[0]["sources"]] == ["en", "fr"]


def test_a_quoted_glob_stands_for_shards_of_one_source(capsys, made, fr, en):
    found, _ = evaluate(capsys, made / "hf", "--data", str(made / "*_document"), "--name", "all")
    assert found["sources"]["all"]["tokens"] == sum(IndexedDataset(p).token_count for p in (fr, en)) - 1


def test_a_recipe_stands_for_what_it_holds_out(capsys, made, fr, en, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 48, "vocab_size": 300, "max_position_embeddings": 64}
    model = "[model]\n" + "".join(f"{key} = {value}\n" for key, value in shape.items())
    train = "[train]\nsteps = 1\nglobal_batch_size = 1\nsequence_length = 16\n"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'{model}[data]\nsources = [{{path = "{fr}"}}]\nsplit = "50,50,0"\n{train}')
    held_out = IndexedDataset(fr)[6:]
    found, _ = evaluate(capsys, made / "hf", "--data", recipe)
    assert found["sources"]["fr"]["tokens"] == sum(map(len, held_out)) - 1
    load = f'[checkpoint]\nload = "{made / "checkpoint"}"\nload_mode = "model"\n'
    recipe.write_text(f'{load}[data]\nsources = [{{path = "{fr}"}}]\nsplit = "50,50,0"\n{train}')
    assert evaluate(capsys, made / "hf", "--data", recipe)[0] == found
    recipe.write_text(f'{model}[data]\nsources = [{{path = "{fr}"}}]\nvalidation = [{{path = "{en}"}}]\n{train}')
    assert evaluate(capsys, made / "hf", "--data", recipe)[0]["sources"].keys() == {"en"}
    recipe.write_text(f'{model}[data]\nsources = [{{path = "{fr}"}}]\n{train}')
    with pytest.raises(MegagapError, match="holds nothing out"):
        evaluate(capsys, made / "hf", "--data", recipe)


def test_bits_per_byte_are_null_where_the_bytes_are_not_known(capsys, caplog, made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    prefix = write(tmp_path / "data", [5, 6, 7, 8])
    found, _ = evaluate(capsys, tmp_path / "bare", "--data", prefix)
    assert "bits per byte of data are not known: no tokenizer is known" in caplog.messages
    assert "the tokenizer of the model is not known" in caplog.text
    assert found["sources"]["data"]["bits_per_byte"] is None
    assert found["sources"]["data"]["bytes"] is None
    assert found["sources"]["data"]["loss"] > 0


def test_another_dtype_is_computed_in(capsys, made, fr):
    (one, _), (other, _) = (evaluate(capsys, made / "hf", "--data", fr, "--dtype", d) for d in ("float32", "bfloat16"))
    assert one["sources"]["fr"]["loss"] != other["sources"]["fr"]["loss"]
    assert one["sources"]["fr"]["loss"] == pytest.approx(other["sources"]["fr"]["loss"], rel=1e-2)


def test_weights_without_finite_losses_give_valid_json_a_message_and_exit_code_2(made, fr, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [python(), TOOL, tmp_path / "hf", "--data", fr, "--json"], capture_output=True, text=True, check=False
    )
    source = json.loads(done.stdout, parse_constant=pytest.fail)["sources"]["fr"]
    assert source["loss"] is source["perplexity"] is source["bits_per_byte"] is None
    assert done.returncode == 2
    assert "is not finite on fr" in done.stderr and "Traceback" not in done.stderr


def other_tokenizer(made, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "quite another text, zzz yyy xxx"}\n' * 9)
    train_tokenizer([tmp_path / "other.jsonl"], tmp_path / "bpe", 290)
    preprocess([tmp_path / "other.jsonl"], str(tmp_path / "other"), str(tmp_path / "bpe"), append_eod=True)
    return [made / "hf", "--data", tmp_path / "other_text_document"]


def other_tokenizer_given(made, tmp_path):
    other_tokenizer(made, tmp_path)
    return [made / "checkpoint", "--data", made / "fr_text_document", "--tokenizer", tmp_path / "bpe"]


def foreign_id(made, tmp_path):
    return [made / "hf", "--data", write(tmp_path / "large", [1, 2, 300])]


def empty_file(made, tmp_path):
    return [made / "hf", "--data", write(tmp_path / "empty")]


def cut_short(made, tmp_path):
    prefix = write(tmp_path / "cut", range(100))
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-50])
    return [made / "hf", "--data", prefix]


def damaged_index(made, tmp_path):
    prefix = write(tmp_path / "bad", range(100))
    (tmp_path / "bad.idx").write_bytes(b"nonsense" * 20)
    return [made / "hf", "--data", prefix]


def missing_data(made, tmp_path):
    return [made / "hf", "--data", tmp_path / "nowhere"]


def no_match(made, tmp_path):
    return [made / "hf", "--data", f"{tmp_path}/*nowhere*"]


def missing_model(made, tmp_path):
    return [tmp_path / "nowhere", "--data", made / "fr_text_document"]


def file_of_model(made, tmp_path):
    return [made / "hf/model.safetensors", "--data", made / "fr_text_document"]


def no_prefix(made, tmp_path):
    return [made / "hf", "--data", ""]


def no_model(made, tmp_path):
    (tmp_path / "folder").mkdir()
    return [tmp_path / "folder", "--data", made / "fr_text_document"]


def too_long(made, tmp_path):
    return [made / "hf", "--data", made / "fr_text_document", "--sequence-length", 65]


def same_name(made, tmp_path):
    return [made / "hf", "--data", made / "fr_text_document", write(tmp_path / "fr_text_document", [1, 2])]


def twice(made, tmp_path):
    return [made / "hf", "--data", made / "fr_text_document", made / "fr_text_document"]


def names(made, tmp_path):
    return [made / "hf", "--data", made / "fr_text_document", "--name", "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            other_tokenizer,
            "mean different tokens from those of the tokenizer .*\n  .*other_text_document was made with",
        ),
        (other_tokenizer_given, "mean different tokens .*\n  name the tokenizer that the model was trained with"),
        (foreign_id, "token id 300 in source large .* outside the vocabulary of 300"),
        (empty_file, "source empty .* has no tokens, none to predict"),
        (cut_short, r"cut.bin is 150 bytes, its .idx promises 200"),
        (damaged_index, "is no token index|is not a token index"),
        (missing_data, "nowhere"),
        (no_match, "no token file matches"),
        (missing_model, "nowhere does not exist"),
        (file_of_model, "is a file of a Hugging Face model\n  give its folder"),
        (no_prefix, "--data has an empty prefix"),
        (no_model, "is an empty folder, not a checkpoint"),
        (too_long, "--sequence-length 65 is longer than the model's max_position_embeddings = 64"),
        (same_name, "two sources are called fr: .*\n  give each a name with --name"),
        (twice, "two sources are called fr"),
        (names, "--name gives 2 names for 1 source"),
    ],
)
def test_input_that_cannot_be_evaluated_is_refused_by_what_is_wrong(capsys, made, tmp_path, arguments, message):
    with pytest.raises(MegagapError, match=message) as error:
        evaluate(capsys, *arguments(made, tmp_path))
    assert error.value.exit_code == 2


def test_help_names_what_the_main_job_of_the_readme_makes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    readme = (TOOL.parents[1] / "README.md").read_text()
    for name in (
        "runs/example/run",
        "runs/example/code_text_document",
        "runs/example/hf",
        "examples/recipes/code.toml",
    ):
        assert name in text and name in readme
