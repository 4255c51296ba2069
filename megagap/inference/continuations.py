"""How likely a model thinks given continuations, and its own greedy ones, many at a time."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megagap.checkpoint.model import SingleProcessModel
from megagap.errors import CheckpointError, DataError
from megagap.inference.generation import opening_tokens
from megagap.inference.likeliest import count_misses
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.tokenizer import Tokenizer


class NotFiniteError(CheckpointError):
    """A model gives no probabilities."""

    def __init__(self) -> None:
        super().__init__("the model's outputs are not finite\n  its training diverged, or its weights are damaged.")


@dataclass(frozen=True)
class Continuation:
    """Tokens whose likelihood after ``context``, which has at least one, is asked for."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


class Row(NamedTuple):
    """A continuation as it is computed."""

    tokens: tuple[int, ...]
    """Of the context, or its end, and of the continuation."""
    scored: int
    """How many of the last tokens are the continuation."""

    @classmethod
    def of(cls, one: Continuation, positions: int) -> "Row":
        """A context that is too long for so many positions loses its beginning. The last token needs no position."""
        return cls((*one.context, *one.tokens)[-positions - 1 :], len(one.tokens))

    @property
    def length(self) -> int:
        """Positions that it takes."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Score:
    nats: float
    """Negative log-likelihood of the continuation."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""
    tokens: int


@torch.no_grad()
def score_continuations(
    model: SingleProcessModel,
    asked: Sequence[Continuation],
    batch_tokens: int,
    progress: Callable[[int], object] = lambda count: None,
    described: Callable[[int], str] = lambda number: "",
) -> list[Score]:
    """In the order of ``asked``. Contexts that are too long for the model lose their beginning.

    ``batch_tokens``: computed at a time, at least one continuation. ``progress`` is told how many are done.
    ``described``: what an error about the continuation of this number begins with.
    Raises :class:`DataError` for a continuation that is empty, has ids that the model lacks, or is longer than its
    positions, and :class:`NotFiniteError` if the model's outputs are not finite.
    """
    positions, vocabulary = model.settings.max_position_embeddings, model.settings.vocab_size
    for number, one in enumerate(asked):
        _check(one, positions, vocabulary, described(number))
    scores: list[Score | None] = [None] * len(asked)
    rows = [Row.of(one, positions) for one in asked]
    for batch in _batches([row.length for row in rows], batch_tokens):
        for number, score in zip(batch, _score(model, [rows[i] for i in batch]), strict=True):
            if not math.isfinite(score.nats):
                raise NotFiniteError
            scores[number] = score
        progress(len(batch))
    return [score for score in scores if score is not None]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


def _check(one: Continuation, positions: int, vocabulary: int, which: str = "") -> None:
    """``which``: begins the message."""
    if not one.tokens or not one.context:
        raise DataError(
            f"{which}a continuation, or what it continues, has no tokens\n  give texts of at least one word."
        )
    if len(one.tokens) > positions:
        raise DataError(
            f"{which}a continuation has {len(one.tokens):,} tokens, more than the model's max_position_embeddings = "
            f"{positions:,}\n  give shorter texts."
        )
    if (highest := max(*one.context, *one.tokens)) >= vocabulary:
        raise DataError(
            f"{which}a text has the token id {highest}, and the model's vocab_size is {vocabulary}\n"
            "  name the tokenizer that the model was trained with, with --tokenizer."
        )


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of similar length, long ones first; padded, a batch has at most ``batch_tokens``, or one row."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _score(model: SingleProcessModel, rows: Sequence[Row]) -> list[Score]:
    """The first row is the longest."""
    stage, device = model.stage, model.stage.output.device
    length = rows[0].length
    inputs, targets = (part.to(device) for part in padded(rows, len(rows), length))
    y = stage(inputs, length)
    _, losses, _ = stage.loss(y, targets, torch.ones((), device=device))
    nats = losses.double().sum(1).tolist()
    misses = count_misses(stage, y, targets).tolist()
    return [Score(nats[i], not misses[i], row.scored) for i, row in enumerate(rows)]


def padded(rows: Sequence[Row], count: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of ``rows``, both int64 [count, length]; only continuations are targets.

    Padding behind a row changes nothing before it, since attention is causal; rows of padding alone fill up.
    """
    inputs = torch.zeros(count, length, dtype=torch.int64)
    targets = torch.full((count, length), IGNORED_TARGET, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        inputs[i, : row.length] = tokens[:-1]
        targets[i, row.length - row.scored : row.length] = tokens[-row.scored :]
    return inputs, targets


@torch.no_grad()
def continue_greedily(
    model: SingleProcessModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
    stop: Collection[int] = (),
    progress: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """The likeliest token after token, for each prompt, up to one of ``stop``. Prompts of one length are computed
    together; those that leave no room lose their beginning.

    Raises :class:`DataError` and :class:`NotFiniteError` as :func:`score_continuations` does.
    """
    positions = model.settings.max_position_embeddings
    room = max(positions - max_new_tokens + 1, 1)
    new = min(max_new_tokens, positions)
    kept = [list(prompt[-room:]) for prompt in prompts]
    for prompt in kept:
        _check(Continuation(tuple(prompt), (0,)), positions, model.settings.vocab_size)
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(kept):
        by_length.setdefault(len(prompt), []).append(number)
    found: list[list[int]] = [[] for _ in prompts]
    for length, numbers in by_length.items():
        rows = max(batch_tokens // (length + new), 1)
        for first in range(0, len(numbers), rows):
            batch = numbers[first : first + rows]
            for number, tokens in zip(batch, _continue(model, [kept[i] for i in batch], new, stop), strict=True):
                found[number] = tokens
            progress(len(batch))
    return found


def _continue(
    model: SingleProcessModel, prompts: Sequence[Sequence[int]], new: int, stop: Collection[int]
) -> list[list[int]]:
    tokens = torch.tensor(prompts, device=model.stage.output.device)
    caches = model.empty_caches(tokens.shape[1] + new - 1, len(prompts))
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device=tokens.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
    chosen: list[Tensor] = []
    for _ in range(new):
        logits = model(tokens, caches)[:, -1]
        if not logits.isfinite().all():
            raise NotFiniteError
        tokens = logits.argmax(-1, keepdim=True)
        chosen.append(tokens[:, 0])
        ended |= torch.isin(tokens[:, 0], ends)
        if ended.all():
            break
    rows = torch.stack(chosen, 1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stop), len(row))] for row in rows]


class TextEncoder:
    """Texts as a model is asked about them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.opening = tuple(opening_tokens(tokenizer))
        """What the tokenizer's own template puts before a text."""

    @property
    def start(self) -> int:
        """The token that an empty context is: begin-of-text, or else end-of-text, as between documents.

        Raises :class:`DataError` if the tokenizer has neither.
        """
        start = self.tokenizer.bos if self.tokenizer.bos is not None else self.tokenizer.eod
        if start is None:
            raise DataError(
                f"the tokenizer {self.tokenizer.spec} has neither a begin-of-text nor an end-of-text token, which an "
                "empty context needs\n  give contexts of at least one word."
            )
        return start

    def encode_context(self, text: str) -> list[int]:
        return [*self.opening, *self.tokenizer.encode(text)] or [self.start]

    def continuation(self, context: str, text: str) -> Continuation:
        """``text`` after ``context``, encoded together: the tokens are those that the whole adds to the context's.

        Blanks at the context's end belong to the text, since tokens begin with them.
        """
        bare = context.rstrip()
        before = self.encode_context(bare)
        whole = [*self.opening, *self.tokenizer.encode(context + text)]
        if not bare:
            return Continuation(tuple(self.opening or [self.start]), tuple(whole[len(self.opening) :]))
        return Continuation(tuple(before), tuple(whole[len(before) :]))


class TextScorer(TextEncoder):
    """A model that is asked about texts."""

    def __init__(self, model: SingleProcessModel, tokenizer: Tokenizer, batch_tokens: int) -> None:
        super().__init__(tokenizer)
        self.model, self.batch_tokens = model, batch_tokens
        self.stop = frozenset(() if tokenizer.eod is None else (tokenizer.eod,))

    def score(
        self, asked: Sequence[tuple[str, str]], progress: Callable[[int], object] = lambda count: None
    ) -> list[Score]:
        """Of pairs of context and continuation."""
        continuations = [self.continuation(context, text) for context, text in asked]

        def described(number: int) -> str:
            context, text = asked[number]
            return f"{_shown(text)} after {_shown(context)}: "

        return score_continuations(self.model, continuations, self.batch_tokens, progress, described)

    def continue_texts(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[str]:
        """Greedy continuations, up to an end of text."""
        encoded = [self.encode_context(prompt) for prompt in prompts]
        found = continue_greedily(self.model, encoded, max_new_tokens, self.batch_tokens, self.stop, progress)
        return [self.tokenizer.decode(tokens) for tokens in found]
