"""Training a tokenizer: byte-level byte-pair encoding with Llama 3's pre-tokenisation."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megagap.errors import DataError, library_errors
from megagap.files import is_there, require_writable_folder, write_together, writing
from megagap.preprocess.documents import Piece, list_texts, read_pieces
from megagap.terminal.progress import ProgressBar
from megagap.tokenizer.words import LLAMA3_WORDS

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
SMALLEST = 256 + 2
"""Every byte and both special tokens."""
LARGEST = 2**24
"""Far beyond any vocabulary in use; the trainer allocates all ids at once."""
SAMPLED_PARTS, SAMPLED_CHARACTERS = 2048, 2048
"""Of the text, parts on which bytes per token are measured, and the characters of each: all of a text of some 4 MB."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on ``texts``. The result has ``vocab_size`` ids if the texts have that many pairs to merge, else fewer.

    Raises :class:`DataError` if there is no text at all.
    """
    if vocab_size < SMALLEST:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and 2 special tokens need {SMALLEST} ids"
        )
    if vocab_size > LARGEST:
        raise DataError(f"a vocabulary of {vocab_size} is too large: at most {LARGEST} ids can be trained")
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise DataError("the inputs have no text to train a tokenizer on: no documents, or only empty ones")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,  # its bar for reading knows no end, and would be mixed with ours
    )
    with library_errors("the tokenizer cannot be trained"):
        tokenizer.train_from_iterator(chain([first], texts), trainer)
    return tokenizer


@dataclass(frozen=True)
class Trained:
    """A tokenizer that was written, and the text it was trained on."""

    vocab_size: int
    """Ids; fewer than asked for if the text was too short."""
    documents: int
    bytes: int
    """Of the text in UTF-8, uncompressed."""
    sample_bytes: int
    """Of the part of this text on which ``bytes_per_token`` was measured."""
    bytes_per_token: float


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    key: str = "text",
    show_progress: bool = False,
    skip: Callable[[DataError], object] | None = None,
) -> Trained:
    """Train on files (JSON lines, Parquet or plain text) and write a folder that ``transformers.AutoTokenizer`` loads.

    Documents that cannot be used are left out if there is ``skip``, which is called with what is wrong; else they raise
    :class:`DataError`. So does a folder that has a tokenizer already.
    """
    folder = Path(output)
    is_new = not folder.exists()
    _require_no_tokenizer(folder)
    require_writable_folder(folder)  # before spending time
    try:
        files = list_texts(inputs, key)
        text = _TrainingText(sum(file.share for file in files), show_progress)
        tokenizer = train_bpe(text.of(read_pieces(files, key, skip)), vocab_size)
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise
    special = {"bos_token": BEGIN, "eos_token": END}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    with writing(folder / "tokenizer.json"):
        texts = {
            "special_tokens_map.json": json.dumps(special, indent=2),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "tokenizer.json": tokenizer.to_str(pretty=True),
        }
        write_together({folder / name: f"{text}\n".encode() for name, text in texts.items()})
    size: int = tokenizer.get_vocab_size(with_added_tokens=True)
    sampled, tokens = text.measure(tokenizer)
    return Trained(size, text.documents, text.bytes, sampled, sampled / tokens)


def _require_no_tokenizer(folder: Path) -> None:
    """Raises :class:`DataError` if the folder has one, or the parts of one: files of two would make a third."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
    if found := [name for name in names if is_there(folder / name)]:
        raise DataError(
            f"{folder} has a tokenizer already: {', '.join(found)}\n"
            "  choose another output, or remove it first; what was made with it would be of no use without it."
        )


class _TrainingText:
    """Passes texts on, counts them, and keeps a sample of their parts, each of which is as likely to be in it.

    The sample is drawn by Vitter's algorithm R (1985), with a fixed seed.
    """

    def __init__(self, file_bytes: int, show_progress: bool) -> None:
        self.documents = 0
        self.bytes = 0
        self._file_bytes = file_bytes
        self._show_progress = show_progress
        self._parts = 0
        self._sample: list[str] = []
        self._random = Random(0)

    def of(self, pieces: Iterable[Piece]) -> Iterator[str]:
        with ProgressBar(
            total=self._file_bytes, unit="B", unit_scale=True, desc="reading", disable=not self._show_progress
        ) as bar:
            for piece in pieces:
                bar.update(piece.file_bytes)
                self.documents += piece.ends
                self.bytes += len(piece.text.encode())
                self._keep(piece.text)
                yield piece.text
            bar.set_postfix_str("read; finding the pairs to merge")

    def _keep(self, text: str) -> None:
        for start in range(0, len(text), SAMPLED_CHARACTERS):
            part = text[start : start + SAMPLED_CHARACTERS]
            self._parts += 1
            if len(self._sample) < SAMPLED_PARTS:
                self._sample.append(part)
            elif (place := self._random.randrange(self._parts)) < SAMPLED_PARTS:
                self._sample[place] = part

    def measure(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Bytes and tokens of the sample."""
        with library_errors("the new tokenizer cannot encode its own text"):
            encoded = tokenizer.encode_batch_fast(self._sample, add_special_tokens=False)
        return sum(len(part.encode()) for part in self._sample), sum(map(len, encoded))
