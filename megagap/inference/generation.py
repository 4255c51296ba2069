"""Text from a model: greedy or sampled, token by token, with a cache of keys and values."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from megagap.checkpoint.companions import (
    companions_of,
    read_companions,
    recorded_tokenizer,
    tokenizer_of,
    warn_of_other_ids,
)
from megagap.checkpoint.huggingface_config import read_settings
from megagap.checkpoint.huggingface_import import is_hugging_face, load_hugging_face_model
from megagap.checkpoint.index import Index
from megagap.checkpoint.load import resolve_checkpoint
from megagap.checkpoint.model import SingleProcessModel, load_model, require_output_projection
from megagap.checkpoint.state import read_ids, read_model
from megagap.errors import CheckpointError, DataError, library_errors
from megagap.tokenizer import Tokenizer, find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits. The default is greedy: the most likely one."""

    temperature: float = 0.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020, section 3.1)."""
    seed: int = 0


@torch.no_grad()
def generate(
    model: SingleProcessModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield the ids that follow ``prompt``, which must not be empty.

    Ends before an id of ``stop``, after ``max_new_tokens``, or when the model's positions are used up.
    Raises :class:`DataError` if the prompt does not fit the model, :class:`CheckpointError` if the model's outputs are
    not finite.
    """
    assert len(prompt) > 0
    sampling = sampling or Sampling()
    settings = model.settings
    _check_prompt(prompt, settings.vocab_size, settings.max_position_embeddings)
    # The last token needs no position: nothing follows it.
    steps = min(max_new_tokens, settings.max_position_embeddings - len(prompt) + 1)
    caches = model.empty_caches(len(prompt) + max(steps - 1, 0))
    device = model.stage.output.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(steps):
        chosen = choose(model(tokens, caches)[0, -1], sampling, generator)
        if chosen in stop:
            return
        yield chosen
        tokens = torch.tensor([[chosen]], device=device)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by its logits [vocab]. Raises :class:`CheckpointError` if they are not finite."""
    if not logits.isfinite().all():
        raise CheckpointError(
            "the model's outputs are not finite\n  its training diverged, or its weights are damaged."
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    below = logits.float() - logits.max().float()
    probabilities = (below / max(sampling.temperature, 1e-30)).softmax(-1)  # fp32 has no much smaller divisors
    if sampling.top_p < 1:
        descending, order = probabilities.sort(descending=True)
        # A token stays if those before it do not reach top_p: the first always does.
        descending[descending.cumsum(-1) - descending >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, descending)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check_prompt(prompt: Sequence[int], vocab_size: int, positions: int) -> None:
    if len(prompt) > positions:
        raise DataError(
            f"the prompt has {len(prompt):,} tokens, more than the model's max_position_embeddings = {positions:,}\n"
            "  shorten the prompt."
        )
    if max(prompt) >= vocab_size:
        raise DataError(
            f"the prompt has the token id {max(prompt)}, and the model's vocab_size is {vocab_size}\n"
            "  name the tokenizer that the model was trained with, with --tokenizer."
        )


class TextStream:
    """The text of ids that arrive one at a time, as soon as it is final.

    The bytes of a character may be spread over several tokens: it appears with the last of them. The pieces put
    together are the text of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        """``before``: ids that precede, whose text has been shown."""
        self._tokenizer = tokenizer
        # One is enough to tell the first piece of a text, which may lose its space, from one within.
        self._ids = list(before[-1:])
        self._shown = len(self._decode())

    def add(self, token: int) -> str:
        """The text that ``token`` makes certain; perhaps none."""
        self._ids.append(token)
        text = self._decode()
        # A tokenizer decodes an unfinished character to these; they stay where it really is one of them.
        certain = text.rstrip("\ufffd")
        piece = text[self._shown : len(certain)]
        if len(certain) == len(text):
            del self._ids[:-1]
            self._shown = len(self._decode())
        else:
            self._shown = max(self._shown, len(certain))
        return piece

    def finish(self) -> str:
        """What is left: characters that were never completed."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids)


@dataclass(frozen=True)
class TextModel:
    """A model and its tokenizer."""

    model: SingleProcessModel
    tokenizer: Tokenizer
    begin: int | None
    """The id that an empty prompt starts from: the tokenizer's begin-of-text, else the model's."""
    stop: frozenset[int]
    """The ids that end a text."""


def load_text_model(path: Path, tokenizer: str | None = None, device: torch.device | None = None) -> TextModel:
    """A checkpoint of any layout, a run (its latest), or a Hugging Face folder.

    ``tokenizer``: None means the one beside a Hugging Face model, or the one that the run was trained with.
    Raises :class:`CheckpointError` if there is no such model, or it is headless, :class:`DataError` if no tokenizer is
    known.
    """
    index = None
    if is_hugging_face(path):
        read_settings(path)  # another model than Llama is refused as such, before its tokenizer is looked at
        source = tokenizer or tokenizer_of(path)
    else:
        path = resolve_checkpoint(path)
        index = Index.read(path)
        require_output_projection(path, read_model(path, index))
        source = tokenizer or recorded_tokenizer(index)
    if source is None:
        raise DataError(f"{path} does not name a tokenizer that still exists\n  name it with --tokenizer.")
    loaded = load_tokenizer(source)
    companions = companions_of(path, index, source, loaded) if index else read_companions(path)
    model = load_model(path, device) if index else load_hugging_face_model(path, device)
    warn_of_other_ids(read_ids(path, index) if index else None, loaded, model.settings.vocab_size, companions)
    own_end = set() if loaded.eod is None else {loaded.eod}
    begin = loaded.bos if loaded.bos is not None else companions.begin_id()
    return TextModel(model, loaded, begin, frozenset(companions.end_ids() | own_end))


def encode_prompt(tokenizer: Tokenizer, text: str, begin: int | None = None) -> list[int]:
    """Ids of a text to continue, begin-of-text before it where the tokenizer's own template puts one.

    A text without tokens is ``begin`` (:attr:`TextModel.begin`), or the begin-of-text that the tokenizer declares.
    Raises :class:`DataError` if there is none.
    """
    ids = opening_tokens(tokenizer) + tokenizer.encode(text)
    begin = tokenizer.bos if begin is None else begin
    if not ids and begin is not None:
        return [begin]
    if not ids:
        raise DataError(
            f"the prompt is empty, and {tokenizer.spec} declares no begin-of-text token to start from\n"
            "  give a prompt of at least one word."
        )
    return ids


def opening_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the template of a ``tokenizer.json`` puts before a text; of other kinds begin-of-text, as in Meta's code."""
    kind, file = find_tokenizer(tokenizer.spec)
    if kind != "hf":
        return [] if tokenizer.bos is None else [tokenizer.bos]
    from tokenizers import Tokenizer as Backend

    with library_errors(f"{file} cannot encode a text"):
        backend = Backend.from_str(file.read_text(encoding="utf-8"))  # it accepts only paths that are valid UTF-8
        backend.no_padding()  # else padding would be mistaken for the template's tokens
        encoding = backend.encode("a")
    return [
        token
        for token, _ in takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    ]
