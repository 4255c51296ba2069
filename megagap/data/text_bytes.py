"""How many bytes of text the tokens of a source stand for: exact, or unknown."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megagap.data.agreement import Ids, is_extension
from megagap.data.manifest import Manifest, read_manifest, tokenizer_record
from megagap.errors import DataError
from megagap.tokenizer import KINDS, Tokenizer, load_tokenizer

UNKNOWN = -1
UNKNOWN_IDS = "it has ids that its tokenizer lacks, or special tokens that may or may not be written out in the text"
"""Why the bytes of some tokens are not known."""


@dataclass(frozen=True)
class TextBytes:
    """The UTF-8 bytes of text that each token id stands for."""

    by_id: NDArray[np.int64]
    """[ids] 0 for ids that are not part of a text, such as end-of-text; ``UNKNOWN`` where that is unclear."""
    source: str
    """Where this is known from, in words."""

    def count(self, tokens: NDArray[np.int64]) -> int | None:
        """Bytes of ``tokens``, ids of any shape; None if one of them is not known."""
        if tokens.size and tokens.max() >= len(self.by_id):
            return None
        sizes = self.by_id[tokens]
        return None if (sizes == UNKNOWN).any() else int(sizes.sum())


class UnknownBytesError(Exception):
    """Why the bytes of text of a source are not known."""


@dataclass(frozen=True)
class PredictedText:
    """What the predicted tokens of an evaluation stand for."""

    tokens: int
    bytes: int
    """Of text, in UTF-8."""

    def bits_per_byte(self, loss: float) -> float:
        """Of a loss that is the mean over these tokens, in nats."""
        return loss * self.tokens / math.log(2) / self.bytes


def predicted_text(
    prefixes: Sequence[str], targets: Iterable[NDArray[np.int64]], tokenizer: Tokenizer | None
) -> PredictedText:
    """Of the predicted tokens ``targets``, which come from the token files ``prefixes``.

    Raises as :func:`text_bytes` does, and :class:`UnknownBytesError` where one of the tokens stands for unknown bytes.
    """
    known = text_bytes(prefixes, tokenizer)
    tokens = total = 0
    for part in targets:
        size = known.count(part)
        if size is None:
            raise UnknownBytesError(UNKNOWN_IDS)
        tokens, total = tokens + part.size, total + size
    if not total:
        raise UnknownBytesError("the predicted tokens stand for no text")
    return PredictedText(tokens, total)


def text_bytes(prefixes: Sequence[str], tokenizer: Tokenizer | None) -> TextBytes:
    """Of the ids in the token files ``prefixes``, from ``tokenizer`` or else the one that a manifest names.

    A tokenizer serves if its ids stand for exactly the bytes of a text, and the files were made with it. Raises
    :class:`UnknownBytesError` if there is none, and :class:`DataError` for a damaged manifest.
    """
    tables: dict[object, TextBytes] = {}
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        # Shards are mostly made alike, and a tokenizer takes a second to load.
        making = manifest and (manifest.tokenizer, manifest.special_tokens, _has_special(manifest))
        if making not in tables:
            tables[making] = _of_bare_pair(tokenizer) if manifest is None else _of_pair(prefix, manifest, tokenizer)
    first, *others = tables.values()
    if any(not np.array_equal(first.by_id, other.by_id) for other in others):
        raise UnknownBytesError("its shards were made with different tokenizers")
    return first


def _of_bare_pair(tokenizer: Tokenizer | None) -> TextBytes:
    """Of a pair without a manifest."""
    if tokenizer is None:
        raise UnknownBytesError("no tokenizer is known")
    _require_bytes(tokenizer)
    return _table(tokenizer, texts_hold_none=False)


def _of_pair(prefix: str, manifest: Manifest, tokenizer: Tokenizer | None) -> TextBytes:
    if manifest.tokenizer.kind == "sentencepiece":
        raise UnknownBytesError(f"{prefix} was made with a sentencepiece model: the bytes of a text are lost")
    if manifest.special_tokens == "parse" and _has_special(manifest):
        raise UnknownBytesError(
            f"special tokens written out in the texts of {prefix} became ids ({manifest.special_tokens_in_texts:,})"
        )
    none = manifest.special_tokens == "text" or _has_special(manifest) is False
    for candidate in _candidates(manifest, tokenizer):
        if _made(candidate, prefix, manifest):
            if manifest.tokenizer.kind == "hf":  # the other kind keeps bytes, whatever has the same tokens now
                _require_bytes(candidate)
            return _table(candidate, texts_hold_none=none)
    raise UnknownBytesError(f"the tokenizer that {prefix} was made with is not available: {manifest.tokenizer.spec}")


def _has_special(manifest: Manifest) -> bool | None:
    """Whether special tokens are written out in the texts; None if that was not counted."""
    count = manifest.special_tokens_in_texts
    return None if count is None else count > 0


def _candidates(manifest: Manifest, tokenizer: Tokenizer | None) -> Iterator[Tokenizer]:
    """Tokenizers that a pair may have been made with, loaded as for that."""
    specs = [str(tokenizer.spec)] if tokenizer else []
    for spec in [*specs, manifest.tokenizer.spec]:
        kind, _, rest = spec.partition(":")
        if os.path.exists(rest if kind in KINDS else spec):
            try:
                yield load_tokenizer(spec, manifest.arguments.special_tokens)
            except DataError:  # another file by now, or of a kind that knows no such choice
                continue


def _made(tokenizer: Tokenizer, prefix: str, manifest: Manifest) -> bool:
    """Whether ``tokenizer`` is the one that the pair was made with, as far as the bytes of ids are concerned."""
    recorded = manifest.tokenizer
    if not is_extension(Ids.of_manifest(prefix, manifest), tokenizer):
        return False
    if recorded.kind != "hf":
        return True  # of a rank file, tokens are all there is to know
    own = tokenizer_record(tokenizer)
    return own.checksum == recorded.checksum or (own.effective is not None and own.effective == recorded.effective)


def _require_bytes(tokenizer: Tokenizer) -> None:
    if not tokenizer.keeps_bytes:
        raise UnknownBytesError(f"the tokenizer {tokenizer.spec} may change a text before it encodes it")


def _table(tokenizer: Tokenizer, *, texts_hold_none: bool) -> TextBytes:
    """``texts_hold_none``: whether no special token in the files comes from a text."""
    by_id = np.full(tokenizer.vocab_size, 0 if texts_hold_none else UNKNOWN, np.int64)
    for token, content in tokenizer.vocabulary().items():
        by_id[token] = len(content)
    for special in (tokenizer.bos, tokenizer.eod):
        if special is not None:
            by_id[special] = 0
    return TextBytes(by_id, f"the tokenizer {tokenizer.spec}")
