"""docs/migration.md names settings that exist and marks the planned ones; its recipe does what its command says."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter

from megagap.config import Settings, load_recipe
from megagap.config.settings import PLANNED, SECTIONS

PAGE = (Path(__file__).parents[1] / "docs/migration.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in PAGE.replace("| |\n", "|  |\n").splitlines()
    if line.startswith("| ") and not line.startswith("| Megatron-LM |")
]
"""Megatron-LM's arguments, torchtitan's keys, ours, and the remark."""
_SETTING = re.compile(rf"\b({'|'.join(SECTIONS)})\.([a-z_]+)\b")


def named_settings(text: str) -> list[tuple[str, str]]:
    """(section, key) of every setting in a text: torchtitan's keys look alike, so its column is to be left out."""
    return _SETTING.findall(text)


def is_planned(section: str, key: str) -> bool:
    return key in PLANNED.get(section, ())


def block(name: str) -> str:
    """The fenced block behind ``<!-- tested: NAME -->``."""
    found = re.search(rf"<!-- tested: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, name
    return found[1]


def test_tables_have_four_columns_and_say_something_of_every_argument():
    assert len(ROWS) > 90
    for row in ROWS:
        assert len(row) == 4 and row[0] and row[1], row
        answered = named_settings(row[2]) or row[2] in ("absent", "not needed") or "--" in row[2] or "RECIPE" in row[2]
        assert answered, row


def test_every_setting_named_on_the_page_exists():
    prose = "\n".join(line for line in PAGE.splitlines() if not line.startswith("| "))
    named = [*named_settings(prose), *(pair for row in ROWS for pair in named_settings(f"{row[2]} {row[3]}"))]
    assert len(set(named)) > 60
    missing = [pair for pair in named if pair[1] not in SECTIONS[pair[0]].model_fields and not is_planned(*pair)]
    assert not missing


def test_planned_settings_are_marked_as_planned_and_no_others():
    for row in ROWS:
        marked = row[2].startswith("planned: ")
        for section, key in named_settings(row[2]):
            assert is_planned(section, key) == marked, f"{section}.{key}"
        assert not any(is_planned(section, key) for section, key in named_settings(row[3])), row


def test_every_value_given_for_a_setting_is_one_that_it_can_have():
    given = [pair for row in ROWS for pair in re.findall(r"`([a-z]+\.[a-z_]+) = ([^`]+)`", row[2])]
    assert len(given) > 8
    for name, text in given:
        section, key = name.split(".")
        field = SECTIONS[section].model_fields[key]
        kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        TypeAdapter(kind).validate_python(tomllib.loads(f"value = {text}")["value"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The recipe of the page, as its command's 64 processes would read it."""
    folder = tmp_path_factory.mktemp("migration")
    (folder / "tokenizers/llama3").mkdir(parents=True)
    (folder / "llama3-8b.toml").write_text(block("recipe"), encoding="utf-8")
    return load_recipe(folder / "llama3-8b.toml", world_size=64)


def megatron_arguments() -> dict[str, list[str]]:
    words = shlex.split(block("megatron command").replace("\\\n", " "))
    arguments: dict[str, list[str]] = {}
    for word in words[words.index("pretrain_gpt.py") + 1 :]:
        if word.startswith("--"):
            arguments[word] = values = []
        else:
            values.append(word)
    return arguments


def test_every_argument_of_the_command_is_in_a_table():
    listed = set(re.findall(r"--[a-z0-9-]+", " ".join(row[0] for row in ROWS)))
    assert megatron_arguments().keys() <= listed


def test_the_recipe_does_what_the_command_says(settings: Settings):
    model, parallel, train, optim = settings.model, settings.parallel, settings.train, settings.optim
    expected = {
        "--tensor-model-parallel-size": parallel.tp,
        "--pipeline-model-parallel-size": parallel.pp,
        "--num-layers": model.num_hidden_layers,
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.intermediate_size,
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.num_key_value_heads,
        "--max-position-embeddings": model.max_position_embeddings,
        "--seq-length": train.sequence_length,
        "--rotary-base": model.rope_theta,
        "--norm-epsilon": model.rms_norm_eps,
        "--init-method-std": model.initializer_range,
        "--micro-batch-size": train.micro_batch_size,
        "--global-batch-size": train.global_batch_size,
        "--train-iters": train.steps,
        "--seed": train.seed,
        "--lr": optim.lr,
        "--min-lr": optim.min_lr,
        "--lr-warmup-iters": optim.warmup_steps,
        "--lr-decay-iters": train.steps,
        "--weight-decay": optim.weight_decay,
        "--adam-beta1": optim.betas[0],
        "--adam-beta2": optim.betas[1],
        "--adam-eps": optim.eps,
        "--clip-grad": optim.clip_grad,
        "--save-interval": settings.checkpoint.every,
        "--eval-interval": train.evaluate_every,
        "--log-interval": settings.run.log_every,
    }
    given = megatron_arguments()
    assert {name: float(given[name][0]) for name in expected} == expected
    sources = [(str(source.weight), Path(source.paths[0])) for source in settings.data.sources]
    paths = given["--data-path"]
    assert [weight for weight, _ in sources] == paths[::2]
    assert [str(path)[-len(name) :] for (_, path), name in zip(sources, paths[1::2], strict=True)] == paths[1::2]
    assert settings.data.split == given["--split"][0] and settings.data.order == "megatron"
    assert optim.schedule == given["--lr-decay-style"][0] and train.precision == "bf16-mixed"
    assert parallel.sequence_parallel and not model.tie_word_embeddings and not model.attention_bias
    evaluated = int(given["--eval-iters"][0]) * train.global_batch_size
    assert train.evaluate_samples * len(sources) == evaluated
