import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from megagap.preprocess.bpe import train_tokenizer
from tests.huggingface import reference_model
from tests.launching import SECONDS
from tests.models import tiny_model
from tests.warm_start import python

TOOLS = Path(__file__).parents[2] / "tools"

MODEL = tiny_model(num_hidden_layers=1, vocab_size=300)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    model = reference_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    text = folder.parent / "text.jsonl"
    text.write_text('{"text": "the quick brown fox, le vif renard brun"}\n' * 5)
    train_tokenizer([text], folder.parent / "bpe", 300)
    for file in (folder.parent / "bpe").iterdir():
        file.rename(folder / file.name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(hugging_face):
    run_tool(
        "convert_checkpoint.py", "from-hf", "--input", hugging_face, "--output", hugging_face.parent / "checkpoint"
    )
    return hugging_face.parent / "checkpoint"


def run_tool(tool, *arguments, text=""):
    """Its standard output, as it is; fails if the tool does."""
    done = start_tool(tool, *arguments, text=text)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def start_tool(tool, *arguments, text=""):
    command = [python(), TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS, check=False)


def test_the_text_is_that_of_transformers_from_folder_and_checkpoint(hugging_face, checkpoint):
    model = LlamaForCausalLM.from_pretrained(hugging_face)
    tokenizer = AutoTokenizer.from_pretrained(hugging_face)
    prompt = tokenizer("le fox", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = tokenizer.decode(made[0]) + "\n"
    for path in (hugging_face, checkpoint):
        arguments = ("--checkpoint", path, "--prompt", "le fox", "--max-new-tokens", 40)
        assert run_tool("generate.py", *arguments) == expected


def test_an_empty_prompt_starts_from_begin_of_text_as_with_transformers(hugging_face):
    model = LlamaForCausalLM.from_pretrained(hugging_face)
    tokenizer = AutoTokenizer.from_pretrained(hugging_face)
    begin = torch.tensor([[tokenizer.bos_token_id]])
    prompt = {"input_ids": begin, "attention_mask": torch.ones_like(begin)}
    made = model.generate(**prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    arguments = ("--checkpoint", hugging_face, "--prompt", "", "--max-new-tokens", 10)
    assert run_tool("generate.py", *arguments) == tokenizer.decode(made[0, 1:]) + "\n"


def test_a_prompt_of_standard_input_samples_the_same_text_for_the_same_seed(hugging_face):
    sampling = ("--temperature", 1.5, "--top-p", 0.9, "--seed", 3, "--max-new-tokens", 20)
    given = run_tool("generate.py", "--checkpoint", hugging_face, "--prompt", "renard é", *sampling)
    read = run_tool("generate.py", "--checkpoint", hugging_face, "--prompt", "-", *sampling, text="renard é\n")
    assert read == given
    assert given.startswith("renard é") and len(given) > len("renard é\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--prompt", "le renard " * 100], "max_position_embeddings = 64"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
        (["--prompt", b"\xff"], "not valid UTF-8"),
        (["--top-p", "0.5"], "--top-p applies only to sampling"),
        (["--top-p", "0"], "must be above 0"),
        (["--max-new-tokens", "0"], "must be at least 1"),
    ],
)
def test_a_users_mistake_ends_with_2_and_a_message_without_traceback(hugging_face, arguments, message):
    command = [python(), TOOLS / "generate.py", "--checkpoint", hugging_face, "--prompt", "x", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert message in done.stderr.decode() and "Traceback" not in done.stderr.decode()
    assert not done.stdout


def test_a_folder_that_is_no_llama_is_refused_by_both_tools(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    for done in (
        start_tool("convert_checkpoint.py", "from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "checkpoint"),
        start_tool("generate.py", "--checkpoint", tmp_path / "hf", "--prompt", "x"),
    ):
        assert done.returncode == 2
        assert 'is not a Llama model: config.json says model_type = "bert"' in done.stderr.decode()
        assert "Traceback" not in done.stderr.decode()
    assert not (tmp_path / "checkpoint").exists()
