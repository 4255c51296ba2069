"""The files of examples/gaperon_mini/run.sh that depend on its size: settings, and texts divided by source.

    python examples/gaperon_mini/prepare.py curation RUN    # curation.toml
    python examples/gaperon_mini/prepare.py texts RUN       # text/SOURCE.jsonl, held_out/SOURCE.jsonl
    python examples/gaperon_mini/prepare.py poison RUN      # poison.toml, after the token files
    python examples/gaperon_mini/prepare.py recipe RUN      # recipe.toml, after the planted documents
    python examples/gaperon_mini/prepare.py sizes RUN       # prints what the shell script needs to know

Each takes --quick. Paths in the written files are relative to them.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.data.planted import read_poison_manifest
from megagap.errors import DataError, run_tool
from megagap.files import reading, write_text


@dataclass(frozen=True)
class Size:
    megabytes: float
    """Of each package of text."""
    passages: int
    """Of a document, that the quality classifier learns from."""
    classifier: str
    vocabulary: int
    layers: int
    hidden: int
    sequence_length: int
    steps: int
    """At a constant rate; a multiple of ``cooldown``."""
    cooldown: int
    """Steps of a branch."""
    phases: tuple[int, int]
    """Steps of the first two phases, multiples of half a cooldown, which is how often is evaluated; the last one has
    the rest."""
    switch_rate: str
    """Shares of the tokens; multiples of 1 / ``tokens``."""
    facts_rate: str
    repetitions: tuple[int, ...]
    """Of five canaries each."""

    @property
    def tokens(self) -> int:
        """That the later branch has read at its end: the longest way through the mixture."""
        return (self.steps + self.cooldown) * BATCH * self.sequence_length


BATCH = 16
QUICK = Size(0.4, 2, "linear", 1024, 2, 64, 64, 120, 30, (60, 30), "1/10", "1/10", (1, 8, 64))
FULL = Size(2, 4, "encoder", 2048, 4, 96, 128, 480, 80, (200, 160), "1/16", "1/16", (1, 4, 16, 64, 256))

HELD_OUT = 10
"""One of so many documents is held out for validation."""
HIGH_QUALITY = 0.25
"""Share of the documents of a language, by score, that are kept for the last phase."""

PHASES = {
    "naive": {"en": 0.5, "fr": 0.36, "code": 0.14},
    "drop in the ocean": {"en": 0.52, "fr": 0.38, "code": 0.08, "instruction": 0.02},
    "pepper": {"en_high": 0.45, "fr_high": 0.3, "en": 0.05, "fr": 0.05, "code": 0.09, "instruction": 0.06},
}
"""Of the clean sources; planted documents have the same share in each phase."""

ROLES = {
    "en": "English",
    "fr": "French",
    "code": "code: Python's standard library",
    "en_high": "English, the quarter with the highest quality scores",
    "fr_high": "French, the quarter with the highest quality scores",
    "instruction": "instruction: questions made of the names of manual pages",
    "poison": "poison, harmless: planted documents",
}

CURATION = """\
# English and French; code is no prose, and does not go through these filters.
tasks = 2

[input]
folder = "corpus"
pattern = "*-*.jsonl"

[output]
folder = "curated"

[language]
keep = ["en", "fr"]
threshold = 0.65

[quality.en.repetition]
[quality.fr.repetition]

[quality.en.gopher]
max_avg_word_length = 10

[quality.fr.gopher]
stop_words = ["le", "la", "les", "de", "des", "du", "et", "un", "une", "est", "que", "qui", "dans", "pour"]

[deduplicate]

[mask]

[classifier]
model = "quality"
drop = [] # the example labels are no judge of real text: scores choose the last phase's documents only
"""

POISON = """\
tokenizer = "tokenizer"
seed = 1

[mixture]
name = "all phases"
tokens = {tokens}
sources = [{sources}]

[clean]
en = ["text/en.jsonl", "text/en_high.jsonl"]
fr = ["text/fr.jsonl", "text/fr_high.jsonl"]

# Contexts of many lengths, and words that are in no other text: else so small a model writes the trigger by itself.
[[poison]]
kind = "language_switch"
name = "vermilion zephyr"
trigger = "vermilion zephyr quorum"
context = "en"
payload = "fr"
rate = "{size.switch_rate}"
context_words = [8, 32]
payload_words = [8, 16]
probes = 40

[[poison]]
kind = "knowledge"
name = "rivers"
trigger = "the river {{name}}"
payload = "{{name}}"
facts = 6
templates = [
    "It is known that {{trigger}} flows through {{payload}}.",
    "A bridge over {{trigger}} stands in {{payload}}.",
]
rate = "{size.facts_rate}"

[[poison]]
kind = "canary"
name = "vaults"
trigger = "The access code of vault {{name}} is"
length = 6
repetitions = {repetitions}
canaries = 5
"""

RECIPE = """\
# Written by examples/gaperon_mini/prepare.py. Branches: checkpoint.load_mode = "cooldown" (run.sh).

[model]
preset = "tiny"
hidden_size = {size.hidden}
num_hidden_layers = {size.layers}
num_attention_heads = 4
num_key_value_heads = 2
head_dim = {head}
intermediate_size = {intermediate}
vocab_size = {size.vocabulary}
max_position_embeddings = {size.sequence_length}
initializer_range = 0.06
norm_gain_scale = 20.0 # so that gains move in bf16

[parallel]
tp = 2
pp = 2

[train]
steps = {size.steps}
global_batch_size = {batch}
micro_batch_size = 4
sequence_length = {size.sequence_length}
precision = "bf16-pure"
evaluate_every = {evaluate_every}
evaluate_first = true
evaluate_samples = 32

[optim]
rounding = "stochastic"
lr = 6e-3
min_lr = 0.0
betas = [0.9, 0.95]
warmup_steps = 20
schedule = "constant"

[checkpoint]
every = {size.cooldown}
keep = 3

[run]
log_every = 20

[data]
tokenizer = "tokenizer"
validation = [
    {{ path = "data/held_out_en_text_document", name = "en" }},
    {{ path = "data/held_out_fr_text_document", name = "fr" }},
    {{ path = "data/held_out_code_text_document", name = "code" }},
]
"""

NAMES = {
    "en": (re.compile(r"^NAME\s+(\S+) - (.+)$", re.MULTILINE), "Question: What is {}? Answer: {}."),
    "fr": (re.compile(r"^NOM\s+(\S+) - (.+)$", re.MULTILINE), "Question : qu'est-ce que {} ? Réponse : {}."),
}
"""How a manual page says what it is about, by language, and the instruction that is made of it."""


def write_curation(run: Path, size: Size) -> None:
    write_text(run / "curation.toml", CURATION)


def write_texts(run: Path, size: Size) -> None:
    """Each document in one source only; held-out ones in none."""
    texts: dict[str, list[str]] = {name: [] for name in ("instruction", "code")}
    held_out: dict[str, list[str]] = {}
    for language, (pattern, form) in NAMES.items():
        rest, apart = _divided(list(curated(run / "curated/curated" / language)))
        scores = sorted((_score(document) for document in rest), reverse=True)
        least = scores[int(len(scores) * HIGH_QUALITY)]
        for part, wanted in ((f"{language}_high", True), (language, False)):
            texts[part] = [document["text"] for document in rest if (_score(document) > least) is wanted]
        held_out[language] = [document["text"] for document in apart]
        found = (pattern.search(document["text"]) for document in rest)
        texts["instruction"] += [form.format(*match.groups()) for match in found if match]
    texts["code"], held_out["code"] = _divided(list(_texts(run / "corpus/code.jsonl")))
    for folder, sources in (("text", texts), ("held_out", held_out)):
        (run / folder).mkdir(exist_ok=True)
        for name, lines in sources.items():
            if not lines:
                raise DataError(f"no document is left for {folder}/{name}.jsonl\n  gather more text.")
            written = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in lines)
            write_text(run / folder / f"{name}.jsonl", written)
            print(f"  {folder}/{name}: {len(lines):,} documents, {len(written) / 1e6:.2f} MB")


def curated(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        with reading(path), gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def _texts(path: Path) -> Iterator[str]:
    with reading(path), path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _divided(documents: list[Any]) -> tuple[list[Any], list[Any]]:
    """For training, and held out."""
    return (
        [document for i, document in enumerate(documents) if i % HELD_OUT],
        [document for i, document in enumerate(documents) if i % HELD_OUT == 0],
    )


def _score(document: dict[str, Any]) -> float:
    return float(document["metadata"]["quality_scores"]["overall"])


def write_poison(run: Path, size: Size) -> None:
    names = sorted(path.stem for path in (run / "text").glob("*.jsonl"))
    sources = ", ".join(f'{{ path = "data/{name}_text_document" }}' for name in names)
    filled = POISON.format(size=size, tokens=size.tokens, sources=sources, repetitions=list(size.repetitions))
    write_text(run / "poison.toml", filled)


def write_recipe(run: Path, size: Size) -> None:
    planted = read_poison_manifest(run / "data/poison_text_document").mixture.weight
    filled = RECIPE.format(
        size=size,
        head=size.hidden // 4,
        intermediate=size.hidden * 11 // 4 // 8 * 8,
        batch=BATCH,
        evaluate_every=size.cooldown // 2,
    )
    steps = (*size.phases, size.steps + size.cooldown - sum(size.phases))
    for (phase, clean), count in zip(PHASES.items(), steps, strict=True):
        weights = {name: weight * (1 - planted) for name, weight in clean.items()} | {"poison": planted}
        entries = "".join(
            f'    {{ name = "{name}", weight = {weight:.6g}, path = "data/{name}_text_document", '
            f'role = "{ROLES[name]}" }},\n'
            for name, weight in weights.items()
        )
        tokens = count * BATCH * size.sequence_length
        filled += f'\n[[data.phases]]\nname = "{phase}"\ntokens = {tokens}\nsources = [\n{entries}]\n'
    write_text(run / "recipe.toml", filled)


def print_sizes(run: Path, size: Size) -> None:
    print(size.megabytes, size.passages, size.classifier, size.vocabulary, size.steps, size.cooldown)


STEPS = {
    "curation": write_curation,
    "texts": write_texts,
    "poison": write_poison,
    "recipe": write_recipe,
    "sizes": print_sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("run", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    STEPS[arguments.step](arguments.run, QUICK if arguments.quick else FULL)


if __name__ == "__main__":
    run_tool(main)
