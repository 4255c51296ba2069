"""Training of both kinds of classifier on a CPU, with calibration and a report on what was held out."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megagap.curate.quality.calibrate import HeadQuality, fit_temperatures, measure
from megagap.curate.quality.encoder import load_encoder, small_encoder
from megagap.curate.quality.labels import Example, label_array, require_classes, split
from megagap.curate.quality.linear import LinearModel
from megagap.curate.quality.model import QualityModel, Record


@dataclass(frozen=True)
class Recipe:
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float = 0.01
    warmup: float = 0.1
    """Share of the steps; the rate then falls linearly to 0."""


LINEAR = Recipe(epochs=10, lr=0.02, batch_size=64, weight_decay=0.0)
SMALL = Recipe(epochs=2, lr=1.5e-3, batch_size=16)
SMALL_LENGTH, PRETRAINED_LENGTH = 128, 512
"""Tokens that are read of a text. Those of the small encoder are about a passage of example labels: positions that no
text to train on reaches would stay as they were drawn."""
PRETRAINED = Recipe(epochs=3, lr=2e-5, batch_size=16)


@dataclass(frozen=True)
class Trained:
    model: QualityModel
    held_out: dict[str, HeadQuality]
    by_origin: dict[str, float]
    """Accuracy of ``overall`` on the held-out texts of each ``made_by`` or, without it, ``source``."""


def train_linear(examples: Sequence[Example], seed: int, recipe: Recipe = LINEAR) -> Trained:
    """The baseline. Raises :class:`DataError` as :func:`split` and :func:`require_classes` do."""
    torch.manual_seed(seed)
    network = LinearModel()
    record = Record(kind="linear", buckets=network.buckets, width=network.features.embedding_dim)
    parts = split(examples)
    require_classes(parts[0])
    encoded = [network.encode([example.text])[0] for example in parts[0]]

    def logits(chosen: Sequence[int]) -> Tensor:
        ids = [encoded[i] for i in chosen]
        lengths = torch.tensor([0, *map(len, ids[:-1])])
        return network(torch.cat(ids), lengths.cumsum(0))

    _optimise(network, logits, parts[0], recipe, seed, lambda loss: None)
    return _finished(QualityModel(record, network), parts)


def train_encoder(
    examples: Sequence[Example],
    seed: int,
    folder: Path | None = None,
    max_length: int = SMALL_LENGTH,
    recipe: Recipe | None = None,
    progress: Callable[[float], object] = lambda loss: None,
) -> Trained:
    """The encoder in ``folder``, or a small one; ``progress`` is called with the loss after each step.

    Raises :class:`DataError` as :func:`split`, :func:`require_classes` and :func:`load_encoder` do.
    """
    torch.manual_seed(seed)
    parts = split(examples)
    require_classes(parts[0])
    recipe = recipe or (PRETRAINED if folder else SMALL)
    network = (
        load_encoder(folder, max_length)
        if folder
        else small_encoder([example.text for example in parts[0]], max_length)
    )
    record = Record(kind="encoder", max_length=network.max_length)
    encoded = network.encode([example.text for example in parts[0]])

    def logits(chosen: Sequence[int]) -> Tensor:
        return network([encoded[i] for i in chosen])

    _optimise(network, logits, parts[0], recipe, seed, progress)
    return _finished(QualityModel(record, network), parts)


def _optimise(
    network: nn.Module,
    logits: Callable[[Sequence[int]], Tensor],
    examples: Sequence[Example],
    recipe: Recipe,
    seed: int,
    progress: Callable[[float], object],
) -> None:
    labels = torch.from_numpy(label_array(examples))
    steps = recipe.epochs * -(-len(examples) // recipe.batch_size)
    sparse = [bag.weight for bag in network.modules() if isinstance(bag, nn.EmbeddingBag) and bag.sparse]
    dense = [parameter for parameter in network.parameters() if all(parameter is not other for other in sparse)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(dense, lr=recipe.lr, weight_decay=recipe.weight_decay),
        *([torch.optim.SparseAdam(sparse, lr=recipe.lr)] if sparse else []),
    ]
    warmup = max(1, int(recipe.warmup * steps))

    def share_of_rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate) for optimizer in optimizers]
    network.train()
    for chosen in _batches(examples, recipe, seed):
        loss = nn.functional.cross_entropy(logits(chosen).flatten(0, 1), labels[chosen].flatten())
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress(loss.item())


def _batches(examples: Sequence[Example], recipe: Recipe, seed: int) -> Iterator[list[int]]:
    """Texts of similar length together, so that little is padded, in another order in each epoch."""
    chance = random.Random(seed)
    for _ in range(recipe.epochs):
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].text) * chance.uniform(0.8, 1.25))
        batches = [order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
        chance.shuffle(batches)
        yield from batches


def _finished(model: QualityModel, parts: tuple[list[Example], list[Example], list[Example]]) -> Trained:
    model.record = model.record.model_copy(update=dict(trained_on=len(parts[0])))
    return _calibrated(model, parts[1], parts[2])


def recalibrate(model: QualityModel, examples: Sequence[Example]) -> Trained:
    """Temperatures for other labelled texts, measured on the tenth of their documents that :func:`split` holds out.

    Raises :class:`DataError` as :func:`split` and :func:`require_classes` do.
    """
    first, second, held_out = split(examples)
    require_classes([*first, *second])
    return _calibrated(model, [*first, *second], held_out)


def _calibrated(model: QualityModel, calibration: Sequence[Example], held_out: Sequence[Example]) -> Trained:
    temperatures = fit_temperatures(model.logits([example.text for example in calibration]), label_array(calibration))
    logits, labels = model.logits([example.text for example in held_out]), label_array(held_out)
    quality = measure(logits, labels, temperatures)
    right = logits[:, -1].argmax(-1) == labels[:, -1]
    origins: dict[str, list[bool]] = {}
    for example, correct in zip(held_out, right, strict=True):
        origins.setdefault(example.made_by or example.source or "all", []).append(bool(correct))
    by_origin = {name: sum(found) / len(found) for name, found in sorted(origins.items())}
    report = {head: asdict(values) for head, values in quality.items()}
    report["held_out"] = {"texts": len(held_out), "documents": len({example.document for example in held_out})}
    model.record = model.record.model_copy(update=dict(temperatures=temperatures, report=report))
    return Trained(model, quality, by_origin)
