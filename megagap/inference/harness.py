"""Tasks of lm-eval (EleutherAI's harness, ``megagap[evaluate]``) on megagap's own models, without a network.

The harness asks for log-likelihoods and greedy continuations of texts; contexts and continuations are encoded as its
own models do it (:meth:`TextScorer.continuation`), so that scores are comparable.
"""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
# Libraries read these when they are imported.
os.environ.update(dict.fromkeys(OFFLINE, "1"))

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from megagap.errors import ConfigError, DataError, library_errors  # noqa: E402
from megagap.inference.continuations import (  # noqa: E402
    Continuation,
    TextScorer,
    continue_greedily,
    score_continuations,
)

DEFAULT_NEW_TOKENS = 256
"""Of a continuation whose task sets no limit, as in lm-eval's own models."""


class Harness:
    """The tasks of these names, from lm-eval and from the folder ``include`` of YAML files.

    Raises :class:`ConfigError` for an unknown task, :class:`DataError` for a folder that is none.
    """

    def __init__(self, names: Sequence[str], include: Path | None) -> None:
        if include is not None and not include.is_dir():
            raise DataError(f"--lm-eval-include {include} is not a folder\n  give the one that holds the YAML files.")
        unknown = list(names)
        with library_errors("cannot list lm-eval's tasks"):
            if include is not None:
                self._manager = TaskManager(include_path=str(include), include_defaults=False)
                unknown = self._unknown(names)
            if unknown:  # lm-eval's own tasks are thousands of files, which take a while
                self._manager = TaskManager(include_path=str(include) if include else None)
                unknown = self._unknown(names)
        if unknown or not names:
            raise ConfigError(
                f"lm-eval has no task {', '.join(unknown) or 'without a name'}\n"
                "  lm-eval ls tasks lists them; --lm-eval-include DIR adds tasks of your own."
            )
        self._names = list(names)

    def _unknown(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self._manager.match_tasks([name])]

    def evaluate(self, scorer: TextScorer, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
        """``{"version", "results": {task: {metric: value}}, "standard_errors": …, "task_versions": …}``.

        Raises :class:`DataError` where a task's data is not on this machine, or it asks what a language model of text
        cannot answer.
        """
        names = ", ".join(self._names)
        hint = "nothing is downloaded: the data has to be in the cache of datasets, or name local files"
        with library_errors(f"lm-eval cannot evaluate {names} ({hint})"):
            found = simple_evaluate(
                model=_Model(scorer),
                tasks=self._names,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=self._manager,
                log_samples=False,
            )
        results: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float]] = {}
        for task, metrics in found["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and "," in metric:
                    name, _, filter_name = metric.partition(",")
                    is_error = name.endswith("_stderr")
                    shown = name.removesuffix("_stderr") + ("" if filter_name == "none" else f",{filter_name}")
                    (errors if is_error else results).setdefault(task, {})[shown] = float(value)
        return {
            "version": version("lm_eval"),
            "results": results,
            "standard_errors": errors,
            "task_versions": {task: found["versions"].get(task) for task in results},
            "num_fewshot": num_fewshot,
            "limit": limit,
        }


class _Model(LM):
    """Answers what the harness asks."""

    def __init__(self, scorer: TextScorer) -> None:
        super().__init__()
        self._scorer = scorer

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scores = self._scorer.score([request.args for request in requests])
        return [(-score.nats, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text in windows of the model's positions, every token predicted once; the last window reaches back."""
        scorer = self._scorer
        positions = scorer.model.settings.max_position_embeddings
        asked: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = [scorer.start, *scorer.tokenizer.encode(request.args[0])]
            for first in range(1, len(tokens), positions):
                stop = min(first + positions, len(tokens))
                context = tuple(tokens[max(stop - positions - 1, 0) : first])
                asked.append(Continuation(context, tuple(tokens[first:stop])))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, score_continuations(scorer.model, asked, scorer.batch_tokens), strict=True):
            totals[owner] -= score.nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy. Raises :class:`ConfigError` for a task that samples."""
        scorer = self._scorer
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ConfigError("the task samples its continuations (do_sample), which is not supported")
            limit = options.get("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS))
            by_length.setdefault(limit, []).append(number)
        found = [""] * len(requests)
        for limit, numbers in by_length.items():
            prompts = [scorer.encode_context(requests[i].args[0]) for i in numbers]
            continued = continue_greedily(scorer.model, prompts, limit, scorer.batch_tokens, scorer.stop)
            for number, tokens in zip(numbers, continued, strict=True):
                until = requests[number].args[1].get("until") or []
                found[number] = _up_to(scorer.tokenizer.decode(tokens), [until] if isinstance(until, str) else until)
        return found


def _up_to(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text
