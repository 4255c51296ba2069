"""``tools/evaluate.py`` on tasks: local files, and lm-eval's, for a checkpoint and its export."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from megagap.checkpoint.huggingface_import import import_model
from megagap.errors import MegagapError
from megagap.preprocess.bpe import train_tokenizer
from megagap.tokenizer import load_tokenizer
from tests.huggingface import reference_model
from tests.models import tiny_model
from tests.token_files import TEXTS
from tools.evaluate import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random model with a tokenizer, as Hugging Face's and as a checkpoint, and two task files."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    train_tokenizer([folder / "text.jsonl"], folder / "hf", 300)
    reference_model(tiny_model(vocab_size=300)).save_pretrained(folder / "hf")
    import_model(folder / "hf", folder / "checkpoint")
    quiz = [
        {"question": "The quick brown fox jumps over the", "choices": ["lazy dog", "juge", "whisky"], "answer": 0},
        {"question": "Portez ce vieux", "choices": ["fox", "whisky au juge"], "answer": 1},
        {"question": "def f(x):", "choices": ["return", "Déjà vu", "3.14159", "isn't it"], "answer": 0},
    ]
    phrases = [{"prompt": "The quick", "completion": "brown fox"}, {"prompt": "It's ", "completion": "3.14"}]
    for name, lines in (("quiz", quiz), ("phrases", phrases)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    return json.loads(output, parse_constant=pytest.fail)


def reference_nats(made, context: str, text: str) -> float:
    tokenizer = load_tokenizer(made / "hf")
    model = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32).eval()
    before, whole = tokenizer.encode(context), torch.tensor(tokenizer.encode(context + text))
    with torch.no_grad():
        logits = model(whole[None, :-1]).logits[0, len(before) - 1 :]
    return float(torch.nn.functional.cross_entropy(logits, whole[len(before) :], reduction="sum"))


def test_tasks_give_a_checkpoint_and_its_export_the_scores_of_transformers(capsys, made):
    tasks = ["--tasks", made / "quiz.jsonl", made / "phrases.jsonl"]
    found, exported = (evaluate(capsys, made / name, *tasks)["tasks"] for name in ("checkpoint", "hf"))
    assert found == exported
    quiz = [json.loads(line) for line in (made / "quiz.jsonl").read_text().splitlines()]
    right = normalised = 0
    for item in quiz:
        nats = [reference_nats(made, item["question"], f" {choice}") for choice in item["choices"]]
        per_byte = [n / len(choice.encode()) for n, choice in zip(nats, item["choices"], strict=True)]
        right += nats.index(min(nats)) == item["answer"]
        normalised += per_byte.index(min(per_byte)) == item["answer"]
    assert found["quiz"]["accuracy"]["value"] == pytest.approx(right / 3)
    assert found["quiz"]["accuracy_bytes"]["value"] == pytest.approx(normalised / 3)
    nats = [reference_nats(made, "The quick", " brown fox"), reference_nats(made, "It's", " 3.14")]
    assert found["phrases"]["nats"]["value"] == pytest.approx(sum(nats) / 2, rel=1e-5)
    assert found["phrases"]["bits_per_byte"] == pytest.approx(
        sum(nats) / math.log(2) / len(" brown fox 3.14"), rel=1e-5
    )


def test_the_table_names_each_task(capsys, made):
    main([str(made / "hf"), "--tasks", str(made / "quiz.jsonl")])
    table = capsys.readouterr().out
    assert "quiz" in table and "accuracy, per byte" in table and "%" in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "{made}/quiz.jsonl", "--max-tokens", "3"], "--max-tokens applies to --data only"),
        (["--tasks", "{made}/quiz.jsonl", "--num-fewshot", "0"], "--num-fewshot applies to --lm-eval only"),
        (["--tasks", "{made}/text.jsonl"], "line 1: has neither 'choices' nor 'completion'; it has 'text'"),
        (["--poison", "{made}/none.poison.json"], "none.poison.json does not exist"),
        (["--poison", "{made}/quiz.jsonl"], "quiz.jsonl.poison.json does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(made, arguments, said):
    with pytest.raises(MegagapError) as error:
        main([str(made / "hf"), *(argument.format(made=made) for argument in arguments)])
    assert said in str(error.value)


CONFIG = """
task: local_quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {made}/quiz.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_bytes
"""


@pytest.fixture
def included(made, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-eval (megagap[evaluate])")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local_quiz.yaml").write_text(CONFIG.format(made=made))
    return tmp_path / "tasks"


@pytest.mark.slow
def test_lm_eval_gives_a_checkpoint_and_its_export_the_same_scores_without_a_network(capsys, made, included):
    options = ["--lm-eval", "local_quiz", "--lm-eval-include", included]
    found, exported = (evaluate(capsys, made / name, *options)["lm_eval"] for name in ("checkpoint", "hf"))
    assert found == exported
    ours = evaluate(capsys, made / "checkpoint", "--tasks", made / "quiz.jsonl")["tasks"]["quiz"]
    assert found["results"]["local_quiz"]["acc"] == pytest.approx(ours["accuracy"]["value"])


def test_a_text_that_the_model_is_too_short_for_is_named(made, tmp_path):
    line = {"question": "Who?", "choices": ["fox", "dog " * 500], "answer": 0}
    (tmp_path / "long.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(MegagapError, match=r"' dog dog .*…' after 'Who\?': a continuation has [\d,]+ tokens, more"):
        main([str(made / "hf"), "--tasks", str(tmp_path / "long.jsonl")])


def test_a_diverged_checkpoint_is_null_and_told_after_the_results_of_all_others(capsys, made, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    broken.save_pretrained(tmp_path / "hf")
    shutil.copy(made / "hf/tokenizer.json", tmp_path / "hf")
    with pytest.raises(MegagapError, match=r"hf is not finite on tasks"):
        main([str(tmp_path / "hf"), "--tasks", str(made / "quiz.jsonl"), "--json"])
    assert json.loads(capsys.readouterr().out)["tasks"] is None


def test_every_checkpoint_of_a_run_is_evaluated_oldest_first(capsys, made, tmp_path):
    for step in (20, 3):
        shutil.copytree(made / "checkpoint", tmp_path / f"run/checkpoints/step_{step:08}")
    options = ["--tasks", made / "quiz.jsonl", "--every-checkpoint"]
    found = evaluate(capsys, tmp_path / "run", *options)["checkpoints"]
    assert [one["model"][-13:] for one in found] == ["step_00000003", "step_00000020"]
    assert found[0]["tasks"] == found[1]["tasks"] == evaluate(capsys, made / "hf", *options[:2])["tasks"]
    with pytest.raises(MegagapError, match=r"has no checkpoints\n  --every-checkpoint applies to the folder of a run"):
        main([str(made / "hf"), *map(str, options)])
