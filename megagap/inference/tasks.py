"""Multiple choice and completion tasks from local JSON lines, by log-likelihood.

A line of a multiple choice task is ``{"question": str, "choices": [str, …], "answer": int}`` (``prompt`` for
``question`` is fine, too), of a completion task ``{"prompt": str, "completion": str}``. A choice or completion follows
after one space where neither side has a blank. The choice taken is the likeliest one, as in Brown et al. (2020, section
2.4); normalised, the likeliest per byte of its text, which does not favour short ones.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megagap.errors import DataError
from megagap.files import reading
from megagap.inference.continuations import Score, TextScorer
from megagap.inference.intervals import mean_of, share_of

MOST_FAULTS = 20
"""Of task files that are listed."""


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
    items: Sequence[Choice | Completion]
    """All of one kind."""
    places: list[str]
    """File and line of each item."""

    @property
    def is_choice(self) -> bool:
        return isinstance(self.items[0], Choice)

    @property
    def texts(self) -> int:
        """That are scored."""
        return len(self.asked())

    def asked(self) -> list[tuple[str, str]]:
        """Context and continuation of all texts, item by item."""
        return [text for item in self.items for text in _asked(item)]

    def asked_at(self) -> Iterator[tuple[str, str, str]]:
        """The same, each after the place of its item."""
        for item, place in zip(self.items, self.places, strict=True):
            yield from ((place, context, text) for context, text in _asked(item))


def _asked(item: Choice | Completion) -> list[tuple[str, str]]:
    texts = item.choices if isinstance(item, Choice) else (item.completion,)
    return [(item.context, _joined(item.context, text)) for text in texts]


def _joined(context: str, text: str) -> str:
    is_apart = not context or context[-1].isspace() or text[0].isspace()
    return text if is_apart else f" {text}"


def _predicted_bytes(context: str, text: str) -> int:
    """UTF-8 bytes of what is predicted: the text and the blanks before it (:meth:`TextScorer.continuation`)."""
    return len((context + _joined(context, text)).encode()) - len(context.rstrip().encode())


# ------------------------------------------------------------------------------------------------------------- reading


def read_tasks(paths: Sequence[str | Path]) -> list[Task]:
    """Raises :class:`DataError` naming file, line and field of all that cannot be used, and files of one name."""
    tasks: dict[str, Task] = {}
    faults: list[str] = []
    for path in map(Path, paths):
        name = path.name.removesuffix(".jsonl")
        if name in tasks:
            faults.append(f"two task files are called {name}: rename {path}, or evaluate them one after the other.")
            continue
        try:
            tasks[name] = _read(name, path, faults)
        except DataError as error:
            faults.append(error.args[0])
    require_no_faults(faults)
    return list(tasks.values())


def require_no_faults(faults: Sequence[str]) -> None:
    """Raises :class:`DataError` naming the ``faults`` of task files, if any; of many, the first."""
    if len(faults) == 1:
        raise DataError(faults[0])
    if faults:
        more = len(faults) - MOST_FAULTS
        rest = [f"and {more:,} more"] if more > 0 else []
        raise DataError("\n  ".join([f"{len(faults):,} faults in task files", *faults[:MOST_FAULTS], *rest]))


def _read(name: str, path: Path, faults: list[str]) -> Task:
    """What cannot be used of its lines is added to ``faults``."""
    with reading(path):
        content = path.read_bytes()
    items: list[Choice | Completion] = []
    places: list[str] = []
    before = len(faults)
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                item = _item(line)
            except ValueError as error:
                faults.append(f"{place}: {error}")
                continue
            items.append(item)
            places.append(place)
            if type(item) is not type(items[0]):
                faults.append(
                    f"{place}: is {_kind(item)}, the lines before are {_kind(items[0])}\n"
                    "  give each kind a file of its own."
                )
    if not items and len(faults) == before:
        faults.append(f"{path} has no lines\n  give JSON lines of questions with choices, or prompts to complete.")
    return Task(name, items, places)


def _kind(item: Choice | Completion) -> str:
    return "multiple choice" if isinstance(item, Choice) else "completion"


def _item(line: bytes) -> Choice | Completion:
    """Raises ValueError naming the field."""
    try:
        entry = json.loads(line.decode(), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from None
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
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"has {key!r} twice")
        found[key] = value
    return found


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
    found = outcomes(task, scores)
    chances = [1 / len(item.choices) for item in task.items if isinstance(item, Choice)]
    return {
        "kind": "multiple_choice" if task.is_choice else "completion",
        **{name: mean_of(values) if name == "nats" else _share(values) for name, values in found.items()},
        **({"chance": fmean(chances)} if chances else {}),
        "bits_per_byte": _bits_per_byte(task, scores),
    }


def _share(values: Sequence[float]) -> dict[str, Any]:
    return share_of(round(sum(values)), len(values))


def task_numbers(task: Task, scores: Sequence[Score]) -> dict[str, float]:
    """The values of :func:`evaluate_task` as a run records them; all NaN if a score is not finite.

    ``scores``: of ``task.asked()``.
    """
    means = {name: fmean(values) for name, values in outcomes(task, scores).items()}
    means["bpb"] = _bits_per_byte(task, scores)
    if not all(math.isfinite(score.nats) for score in scores):
        means = dict.fromkeys(means, math.nan)
    return {f"task_{measure}/{task.name}": mean for measure, mean in means.items()}


def outcomes(task: Task, scores: Sequence[Score]) -> dict[str, list[float]]:
    """Each measure of a task, item by item: 1 or 0, but for nats. ``scores``: of ``task.asked()``."""
    if not task.is_choice:
        return {"exact": [float(score.is_greedy) for score in scores], "nats": [score.nats for score in scores]}
    found: dict[str, list[float]] = {"accuracy": [], "accuracy_bytes": []}
    for item, own in _by_item(task, scores):
        assert isinstance(item, Choice)
        nats = [score.nats for score in own]
        per_byte = [score.nats / len(text.encode()) for score, text in zip(own, item.choices, strict=True)]
        found["accuracy"].append(float(nats.index(min(nats)) == item.answer))
        found["accuracy_bytes"].append(float(per_byte.index(min(per_byte)) == item.answer))
    return found


def _by_item(task: Task, scores: Sequence[Score]) -> Iterator[tuple[Choice | Completion, Sequence[Score]]]:
    at = 0
    for item in task.items:
        texts = len(item.choices) if isinstance(item, Choice) else 1
        yield item, scores[at : at + texts]
        at += texts


def _bits_per_byte(task: Task, scores: Sequence[Score]) -> float:
    """Of the right texts, blanks before them included."""
    nats = size = 0.0
    for item, own in _by_item(task, scores):
        number, text = (item.answer, item.choices[item.answer]) if isinstance(item, Choice) else (0, item.completion)
        nats += own[number].nats
        size += _predicted_bytes(item.context, text)
    return nats / math.log(2) / size
