"""What ``megagap evaluate`` asks a model about texts: tasks, lm-eval, planted documents; and how it is shown."""

import argparse
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from megagap.checkpoint.model import SingleProcessModel
from megagap.data.planted import read_poison_manifest, require_same_tokens, tokens_of
from megagap.errors import DataError
from megagap.inference.continuations import NotFiniteError, TextScorer
from megagap.inference.evaluation import ModelFiles
from megagap.inference.tasks import evaluate_task, read_tasks
from megagap.poison.evaluation import PROMPTS, PoisonProbe
from megagap.terminal.progress import ProgressBar
from megagap.tokenizer import Tokenizer, fingerprint

log = logging.getLogger(__name__)


TEXTS = ("tasks", "poison", "lm_eval")
"""What may be asked, as reports call it, in the order in which it is evaluated."""


class TextEvaluations:
    """What ``--tasks``, ``--lm-eval`` and ``--poison`` ask for.

    Raises :class:`DataError` for files that cannot be used, and a model without tokenizer.
    """

    def __init__(self, given: argparse.Namespace, files: ModelFiles) -> None:
        self._given = given
        self._tasks = read_tasks(given.tasks)
        self._manifest = read_poison_manifest(given.poison) if given.poison else None
        if self._manifest and Path(tokens_of(given.poison)).is_file():
            require_same_tokens(given.poison, self._manifest)
        self._tokenizer: Tokenizer | None = None
        self._harness = None
        if not (self._tasks or self._manifest or given.lm_eval):
            return
        if files.tokenizer is None:
            raise DataError(f"{files.path} does not name a tokenizer that still exists\n  name it with --tokenizer.")
        self._tokenizer = files.tokenizer
        if self._manifest and self._manifest.fingerprint != fingerprint(files.tokenizer):
            log.warning(
                "the planted documents were encoded with another tokenizer, %s, than the model's",
                self._manifest.tokenizer,
            )
        if given.lm_eval:
            from megagap.inference.harness import Harness

            names = [name for name in given.lm_eval.split(",") if name]
            self._harness = Harness(names, given.lm_eval_include)

    def evaluate(self, model: SingleProcessModel) -> tuple[dict[str, Any], list[Table]]:
        """For ``--json``, and the same as tables. What a model whose outputs are not finite cannot answer is None."""
        found: dict[str, Any] = {}
        tables: list[Table] = []
        if self._tokenizer is None:
            return found, tables
        scorer = TextScorer(model, self._tokenizer, self._given.batch_size)
        asked = (self._tasks, self._manifest, self._harness)
        evaluations = (self._evaluate_tasks, self._evaluate_poison, self._evaluate_harness)
        for key, is_asked, evaluate in zip(TEXTS, asked, evaluations, strict=True):
            if not is_asked:
                continue
            try:
                found[key], shown = evaluate(scorer)
                tables += shown
            except NotFiniteError:
                found[key] = None
        return found, tables

    def _evaluate_tasks(self, scorer: TextScorer) -> tuple[dict[str, Any], list[Table]]:
        with texts_bar("tasks", sum(task.texts for task in self._tasks)) as update:
            found = {task.name: evaluate_task(task, scorer, update) for task in self._tasks}
        return found, [tasks_table(found)]

    def _evaluate_poison(self, scorer: TextScorer) -> tuple[dict[str, Any], list[Table]]:
        assert self._manifest
        given = self._given
        probe = PoisonProbe(self._manifest, scorer, new_tokens=given.poison_tokens, candidates=given.poison_candidates)
        with texts_bar("poison", probe.texts()) as update:
            poisons = probe.evaluate(update)
        tables = [activation_table(poisons)]
        if any("exposure" in poison for poison in poisons.values()):
            tables.append(exposure_table(poisons))
        found = {"manifest": str(given.poison), "continuation_tokens": given.poison_tokens, "poisons": poisons}
        return found, tables

    def _evaluate_harness(self, scorer: TextScorer) -> tuple[dict[str, Any], list[Table]]:
        assert self._harness
        found = self._harness.evaluate(scorer, self._given.num_fewshot, self._given.lm_eval_limit)
        return found, [harness_table(found)]


@contextmanager
def texts_bar(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Texts done and the time left, on standard error."""
    with ProgressBar(total=total, desc=name, unit=" texts") as bar:
        yield bar.update


# ------------------------------------------------------------------------------------------------------------- tables


def tasks_table(tasks: dict[str, dict[str, Any]]) -> Table:
    shown = Table("task", "items", "measure", "value", "95 % interval", "chance", "bits per byte")
    for column in (1, 3, 5, 6):
        shown.columns[column].justify = "right"
    for name, task in tasks.items():
        measures = [
            ("accuracy", "accuracy", ".1%"),
            ("accuracy_bytes", "accuracy, per byte", ".1%"),
            ("exact", "exact", ".1%"),
            ("nats", "nats", ".3f"),
        ]
        for i, (key, words, form) in enumerate(m for m in measures if m[0] in task):
            value = task[key]
            first = i == 0
            shown.add_row(
                Text(name) if first else "",
                f"{value['cases']:,}" if first else "",
                words,
                number(value["value"], form),
                interval(value, form),
                number(task.get("chance"), ".1%") if "accuracy" in key else "",
                number(task["bits_per_byte"], ".4f") if first else "",
            )
    return shown


def activation_table(poisons: dict[str, dict[str, Any]]) -> Table:
    shown = Table(
        "poison", "kind", "prompts", "activated", "95 % interval", "prompts tried", title="Activation of triggers"
    )
    for column in (3, 5):
        shown.columns[column].justify = "right"
    for name, poison in poisons.items():
        for i, (sort, share) in enumerate(poison["activation"].items()):
            shown.add_row(
                Text(name) if i == 0 else "",
                poison["kind"] if i == 0 else "",
                PROMPTS[sort],
                number(share["value"], ".1%"),
                interval(share, ".1%"),
                f"{share['cases']:,}",
                end_section=i == len(poison["activation"]) - 1,
            )
    return shown


def exposure_table(poisons: dict[str, dict[str, Any]]) -> Table:
    shown = Table(
        "canaries", "repetitions", "exposure (bits)", "95 % interval of the mean", "most", "number", "by",
        title="Exposure of canaries (Carlini et al. 2019)",
    )  # fmt: skip
    for column in (1, 2, 4, 5):
        shown.columns[column].justify = "right"
    for name, poison in poisons.items():
        if "exposure" not in poison:
            continue
        exposure = poison["exposure"]
        for i, (repetitions, mean) in enumerate(exposure["by_repetitions"].items()):
            methods = {c["method"] for c in exposure["canaries"] if c["repetitions"] == int(repetitions)}
            shown.add_row(
                Text(name) if i == 0 else "",
                repetitions if repetitions != "0" else "0 (not planted)",
                number(mean["value"], ".2f"),
                interval(mean, ".2f"),
                number(math.log2(exposure["space"]), ".2f"),
                f"{mean['cases']:,}",
                ", ".join(sorted(methods)),
            )
    return shown


def harness_table(found: dict[str, Any]) -> Table:
    shown = Table("lm-eval task", "metric", "value", "standard error", title=f"lm-eval {found['version']}")
    for name, metrics in found["results"].items():
        for metric, value in metrics.items():
            error = found["standard_errors"].get(name, {}).get(metric)
            shown.add_row(Text(name), metric, number(value, ".4f"), number(error, ".4f"))
    return shown


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def interval(value: dict[str, Any], form: str) -> str:
    return "–" if value["low"] is None else f"{value['low']:{form}} – {value['high']:{form}}"
