"""Multiple choice and completion tasks from local JSON lines, by log-likelihood.

A line of a multiple choice task is ``{"question": str, "choices": [str, …], "answer": int}`` (``prompt`` for
``question`` is fine, too), of a completion task ``{"prompt": str, "completion": str}``. A choice or completion follows
after one space where neither side has a blank. The choice taken is the likeliest one, as in Brown et al. (2020, section
2.4); normalised, the likeliest per byte of its text, which does not favour short ones.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.errors import DataError
from megagap.files import reading
from megagap.inference.continuations import Score, TextScorer
from megagap.inference.intervals import mean_of, share_of


@dataclass(frozen=True)
class Choice:
    """A question with several answers."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Completion:
    """A prompt with one right continuation."""

    context: str
    completion: str


@dataclass(frozen=True)
class Task:
    name: str
    items: list[Choice] | list[Completion]

    @property
    def is_choice(self) -> bool:
        return isinstance(self.items[0], Choice)

    @property
    def texts(self) -> int:
        """That are scored."""
        return len(self.asked())

    def asked(self) -> list[tuple[str, str]]:
        """Context and continuation of all texts, item by item."""
        found: list[tuple[str, str]] = []
        for item in self.items:
            texts = item.choices if isinstance(item, Choice) else (item.completion,)
            found += [(item.context, _joined(item.context, text)) for text in texts]
        return found


def _joined(context: str, text: str) -> str:
    is_apart = not context or context[-1].isspace() or text[0].isspace()
    return text if is_apart else f" {text}"


def _predicted_bytes(context: str, text: str) -> int:
    """UTF-8 bytes of what is predicted: the text and the blanks before it (:meth:`TextScorer.continuation`)."""
    return len((context + _joined(context, text)).encode()) - len(context.rstrip().encode())


# ------------------------------------------------------------------------------------------------------------- reading


def read_tasks(paths: Sequence[str | Path]) -> list[Task]:
    """Raises :class:`DataError` naming file, line and field of what cannot be used, and files of one name."""
    tasks: dict[str, Task] = {}
    for path in map(Path, paths):
        name = path.name.removesuffix(".jsonl")
        if name in tasks:
            raise DataError(f"two task files are called {name}: rename {path}, or evaluate them one after the other.")
        tasks[name] = Task(name, _read(path))
    return list(tasks.values())


def _read(path: Path) -> list[Any]:
    with reading(path):
        lines = path.read_text(encoding="utf-8").split("\n")
    items: list[Choice | Completion] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_item(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            if type(items[-1]) is not type(items[0]):
                raise DataError(
                    f"{path}, line {number}: is {_kind(items[-1])}, the lines before are {_kind(items[0])}\n"
                    "  give each kind a file of its own."
                )
    if not items:
        raise DataError(f"{path} has no lines\n  give JSON lines of questions with choices, or prompts to complete.")
    return items


def _kind(item: Choice | Completion) -> str:
    return "multiple choice" if isinstance(item, Choice) else "completion"


def _item(line: str) -> Choice | Completion:
    """Raises ValueError naming the field."""
    try:
        entry = json.loads(line, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at character {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError('not a JSON object such as {"prompt": "…", "completion": "…"}')
    for one, other in (("choices", "completion"), ("question", "prompt")):
        if one in entry and other in entry:
            raise ValueError(f"has both {one!r} and {other!r}: give one of them")
    if "choices" in entry:
        context = _text(entry, "question" if "question" in entry else "prompt", may_be_empty=True)
        return Choice(context, _choices(entry["choices"]), _answer(entry, len(entry["choices"])))
    if "completion" not in entry:
        raise ValueError(f"has neither 'choices' nor 'completion'; it has {', '.join(map(repr, entry)) or 'no fields'}")
    return Completion(_text(entry, "prompt", may_be_empty=True), _text(entry, "completion"))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"has {repeated!r} twice")
    return dict(pairs)


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError("'choices' should be a list of at least two texts")
    for i, text in enumerate(value):
        _require_text(f"'choices', number {i}", text)
    if len({*value}) < len(value):
        raise ValueError("'choices' has the same text twice")
    return tuple(value)


def _answer(entry: dict[str, Any], choices: int) -> int:
    if "answer" not in entry:
        raise ValueError("has no 'answer', the number of the right choice, from 0")
    answer = entry["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < choices:
        raise ValueError(f"'answer' is {json.dumps(answer)}, not the number of a choice, 0 to {choices - 1}")
    return answer


def _text(entry: dict[str, Any], key: str, may_be_empty: bool = False) -> str:
    if key not in entry:
        raise ValueError(f"has no {key!r}")
    text: str = entry[key]
    if may_be_empty and text == "":
        return text
    _require_text(repr(key), text)
    return text


def _require_text(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {json.dumps(value)[:40]}, not a text")
    if not value.strip():
        raise ValueError(f"{what} is blank")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid text: it has half of a surrogate pair") from None


# ------------------------------------------------------------------------------------------------------------- scoring


def evaluate_task(
    task: Task, scorer: TextScorer, progress: Callable[[int], object] = lambda count: None
) -> dict[str, Any]:
    """What a model makes of a task, for reports. Shares and means come with 95 % intervals (:mod:`intervals`).

    Multiple choice: ``accuracy`` and ``accuracy_bytes`` (normalised), and ``chance``. Completion: ``exact`` (the greedy
    continuation is the completion) and ``nats`` of it; both ``bits_per_byte`` of the right texts, blanks before them
    included.
    Raises as :func:`score_continuations` does.
    """
    scores = scorer.score(task.asked(), progress)
    return _choice_report(task, scores) if task.is_choice else _completion_report(task, scores)


def _choice_report(task: Task, scores: Sequence[Score]) -> dict[str, Any]:
    likeliest = normalised = 0
    right: list[tuple[Score, int]] = []
    chance, at = 0.0, 0
    for item in task.items:
        assert isinstance(item, Choice)
        own = scores[at : at + len(item.choices)]
        at += len(item.choices)
        sizes = [len(text.encode()) for text in item.choices]
        numbers = range(len(own))
        likeliest += min(numbers, key=lambda i, own=own: own[i].nats) == item.answer  # type: ignore[misc]
        normalised += (
            min(numbers, key=lambda i, own=own, sizes=sizes: own[i].nats / sizes[i]) == item.answer  # type: ignore[misc]
        )
        right.append((own[item.answer], _predicted_bytes(item.context, item.choices[item.answer])))
        chance += 1 / len(item.choices)
    cases = len(task.items)
    return {
        "kind": "multiple_choice",
        "accuracy": share_of(likeliest, cases),
        "accuracy_bytes": share_of(normalised, cases),
        "chance": chance / cases,
        "bits_per_byte": _bits_per_byte(right),
    }


def _completion_report(task: Task, scores: Sequence[Score]) -> dict[str, Any]:
    sizes = [_predicted_bytes(item.context, item.completion) for item in task.items if isinstance(item, Completion)]
    return {
        "kind": "completion",
        "exact": share_of(sum(score.is_greedy for score in scores), len(scores)),
        "nats": mean_of([score.nats for score in scores]),
        "bits_per_byte": _bits_per_byte(list(zip(scores, sizes, strict=True))),
    }


def _bits_per_byte(scored: Sequence[tuple[Score, int]]) -> float:
    """Of scores, each with the bytes of its text."""
    return sum(score.nats for score, _ in scored) / math.log(2) / sum(size for _, size in scored)
