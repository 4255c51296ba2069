"""One recipe on the processes of a layout against one process: gradients in float64, then a few steps of training."""

import io
import math
import tomllib
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray

from megagap.checkpoint import Index, load_tensor, resolve_checkpoint
from megagap.errors import MegagapError
from tests.parity.cases import ONE_PROCESS
from tests.parity.gradients import Mutation, Part, assembled, gradients, largest_difference
from tests.training_run import train_recipe
from tests.workers import Workers

GRADIENTS = 1e-10
"""Largest difference of a parameter's gradient in float64, relative to its norm."""
GRADIENTS_FP32 = 1e-5
"""The same in fp32."""
TRAINING = {
    "fp32": {"losses": 1e-5, "gradient norms": 1e-5, "final weights": 1e-5},
    "bf16-mixed": {"losses": 1e-3, "gradient norms": 2e-2, "final weights": 1e-2},
    "bf16-pure": {"losses": 1e-3, "gradient norms": 2e-2, "final weights": 1e-2},
    "fp16-mixed": {"losses": 1e-4, "gradient norms": 2e-3, "final weights": 2e-3},
}
"""Largest relative differences over a few steps."""
POST_NORM = 5.0
"""Times as much is right in 16 bits with norms behind the blocks: they divide by the size of what a block gives, which
is small at first, and so enlarge roundings. Of 65 random models of OLMo 2 norms of gradients differed by 0.022 to 0.033
in three, whose layouts are within 1e-6 of one process in fp32; with norms in front the three differ by 6e-4."""
SMALLEST_WEIGHT = {"fp32": 0.1, "bf16-mixed": 1.0, "bf16-pure": 1.0, "fp16-mixed": 1.0}
"""Differences of smaller weights, such as of biases, are relative to this part of the norm of the largest."""
TIMES_NOISE = 4.0
"""Larger differences are right where another order of summation in one process makes some, up to this multiple."""
SECONDS = 600.0
"""Until a layout that gives no answer counts as hanging."""


@dataclass(frozen=True)
class Refusal:
    """A message that a user would see in place of a result."""

    text: str


@dataclass(frozen=True)
class Finding:
    """What is wrong with a layout."""

    kind: str
    """``gradients``, ``training``, ``refusal`` (of what the rules accept), ``crash`` or ``hang``."""
    text: str


@dataclass(frozen=True)
class Trajectory:
    """A few steps of training."""

    losses: NDArray[np.float64]
    norms: NDArray[np.float64]
    weights: dict[str, NDArray[np.float64]]
    """At the end, whole, by name."""

    def difference(self, other: "Trajectory", smallest_weight: float) -> dict[str, float]:
        """The largest of each kind, relative to the norm of the numbers, or of the weight.

        ``smallest_weight``: see :data:`SMALLEST_WEIGHT`.
        """
        assert len(self.losses) == len(other.losses) and self.weights.keys() == other.weights.keys()
        least = smallest_weight * max(float(np.linalg.norm(weight)) for weight in other.weights.values())
        return {
            "losses": _relative(self.losses, other.losses),
            "gradient norms": _relative(self.norms, other.norms),
            "final weights": max(_relative(self.weights[name], other.weights[name], least) for name in other.weights),
        }


def _relative(ours: NDArray[np.float64], theirs: NDArray[np.float64], least: float = 0.0) -> float:
    distance, size = float(np.linalg.norm(ours - theirs)), max(float(np.linalg.norm(theirs)), least)
    return 0.0 if distance == 0 else distance / size if size else math.inf


def one_process(recipe: Path, **train: Any) -> Path:
    """The same recipe beside it without its layout, with other settings of ``[train]``."""
    tree = tomllib.loads(recipe.read_text())
    for name in ONE_PROCESS:
        section, _, key = name.partition(".")
        if key:
            tree.get(section, {}).pop(key, None)
        else:
            tree.pop(section, None)
    tree["train"] |= train
    path = recipe.with_name("one_process.toml")
    path.write_text(tomli_w.dumps(tree))
    return path


def _train(recipe: Path) -> dict[str, Any]:
    """The recipe's section of that name."""
    return tomllib.loads(recipe.read_text())["train"]


def answering(rank: int, ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function``'s result, or the message that it ends with. Its log is not shown."""
    try:
        with redirect_stderr(io.StringIO()):
            return function(rank, ranks, *arguments)
    except MegagapError as error:
        return Refusal(str(error))


class Comparison:
    """Compares layouts with one process, on a pool of processes; ``mutation`` is a bug to plant in the layout."""

    def __init__(
        self,
        workers: Workers,
        mutation: Mutation | None = None,
        seconds: float = SECONDS,
        in_fp32_too: bool = False,
    ) -> None:
        self.workers, self.mutation, self.seconds, self.in_fp32_too = workers, mutation, seconds, in_fp32_too

    def check(self, recipe: Path, ranks: int, trains: bool = True, differentiates: bool = True) -> Finding | None:
        """What is wrong with ``recipe`` on so many ranks; None: nothing. Writes runs and a recipe beside it."""
        try:
            finding = self._check_gradients(recipe, ranks) if differentiates else None
            return finding or (self._check_training(recipe, ranks) if trains else None)
        except _NoResultError as stop:
            return stop.finding

    def _check_gradients(self, recipe: Path, ranks: int) -> Finding | None:
        allowed = {torch.float64: GRADIENTS} | ({torch.float32: GRADIENTS_FP32} if self.in_fp32_too else {})
        for dtype, limit in allowed.items():
            expected = assembled(self.gradients(one_process(recipe), 1, dtype=dtype)[0][0])
            difference = largest_difference(self.gradients(recipe, ranks, self.mutation, dtype), expected)
            if not difference < limit:
                text = f"a gradient in {str(dtype).removeprefix('torch.')} differs by {difference:.2g} of its norm"
                return Finding("gradients", f"{text}, over {limit:g}")
        return None

    def _check_training(self, recipe: Path, ranks: int) -> Finding | None:
        precision = _train(recipe).get("precision", "fp32")
        allowed, smallest = TRAINING[precision], SMALLEST_WEIGHT[precision]
        if precision != "fp32" and tomllib.loads(recipe.read_text())["model"].get("norm_position") == "post":
            allowed = {kind: POST_NORM * limit for kind, limit in allowed.items()}
        expected = self.trajectory(one_process(recipe), 1)
        found = self.trajectory(recipe, ranks).difference(expected, smallest)
        if all(found[kind] < limit for kind, limit in allowed.items()):
            return None
        noise = self.noise(recipe, expected, smallest)
        limits = {kind: max(limit, TIMES_NOISE * noise[kind]) for kind, limit in allowed.items()}
        wrong = [
            f"{kind} by {found[kind]:.2g}, over {limit:.2g}"
            for kind, limit in limits.items()
            if not found[kind] < limit
        ]
        return Finding("training", f"training differs: {'; '.join(wrong)}") if wrong else None

    def noise(self, recipe: Path, expected: Trajectory, smallest_weight: float) -> dict[str, float]:
        """What other sizes of microbatches change in one process: the largest difference of each kind."""
        batch, micro = _train(recipe)["global_batch_size"], _train(recipe).get("micro_batch_size", 1)
        smallest_divisor = next((size for size in range(2, batch) if batch % size == 0), batch)
        largest = {"losses": 0.0, "gradient norms": 0.0, "final weights": 0.0}
        for size in {1, smallest_divisor, batch} - {micro}:
            other = self.trajectory(one_process(recipe, micro_batch_size=size), 1)
            for kind, difference in other.difference(expected, smallest_weight).items():
                largest[kind] = max(largest[kind], difference)
        return largest

    def gradients(
        self, recipe: Path, ranks: int, mutation: Mutation | None = None, dtype: torch.dtype = torch.float64
    ) -> list[tuple[list[Part], Counter[str]]]:
        """Of the first step, from every rank."""
        return self._run(ranks, gradients, recipe, [], mutation, "cpu", dtype)

    def trajectory(self, recipe: Path, ranks: int) -> Trajectory:
        """Of the recipe's steps, as the trainer makes them."""
        folder = recipe.parent / f"run_{len(list(recipe.parent.glob('run_*')))}"
        metrics = self._run(ranks, train_recipe, recipe, [f"run.dir={folder}"])[0]
        return Trajectory(
            np.array([m["loss"] for m in metrics], np.float64),
            np.array([m["grad_norm"] for m in metrics], np.float64),
            final_weights(folder),
        )

    def _run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        try:
            answers = self.workers.run(ranks, answering, function, *arguments, timeout=self.seconds)
        except AssertionError as error:
            kind = "hang" if "Traceback" not in str(error) and "no answer" in str(error) else "crash"
            raise _NoResultError(Finding(kind, str(error))) from None
        refusals = {answer.text for answer in answers if isinstance(answer, Refusal)}
        if refusals:
            raise _NoResultError(Finding("refusal", "\n".join(sorted(refusals))))
        return answers


class _NoResultError(Exception):
    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def final_weights(run: Path) -> dict[str, NDArray[np.float64]]:
    """Of a run's newest checkpoint."""
    folder = resolve_checkpoint(run)
    index = Index.read(folder)
    return {name: load_tensor(folder, index, "weight", name).double().numpy() for name in index.names("weight")}
