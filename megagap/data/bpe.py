"""Training a tokenizer: byte-level byte-pair encoding with Llama 3's pre-tokenisation."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megagap.data.documents import read_texts
from megagap.data.tokenizer.words import LLAMA3_WORDS
from megagap.errors import DataError, library_errors
from megagap.files import require_writable_folder, write_together, writing

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
SMALLEST = 256 + 2
"""Every byte and both special tokens."""
LARGEST = 2**24
"""Far beyond any vocabulary in use; the trainer makes room for all ids at once."""


def train_bpe(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """Train on ``texts``. The result has ``vocab_size`` ids if the texts have that many pairs to merge, else fewer.

    Raises :class:`DataError` if there is no text at all.
    """
    if vocab_size < SMALLEST:
        raise DataError(f"a vocabulary of {vocab_size} is too small: 256 bytes and 2 special tokens need {SMALLEST}")
    if vocab_size > LARGEST:
        raise DataError(f"a vocabulary of {vocab_size} is too large: at most {LARGEST} ids can be trained")
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on: no documents, or only empty ones")
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
        show_progress=show_progress,
    )
    with library_errors("the tokenizer cannot be trained"):
        tokenizer.train_from_iterator(chain([first], texts), trainer)
    return tokenizer


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    key: str = "text",
    show_progress: bool = False,
    skip: Callable[[DataError], object] | None = None,
) -> int:
    """Train on files (JSON lines or plain text) and write a folder that ``transformers.AutoTokenizer`` loads.

    Returns the number of ids, which is less than ``vocab_size`` if the text was too short. Documents that cannot be
    used are left out if there is ``skip``, which is called with what is wrong; else they raise :class:`DataError`.
    """
    folder = Path(output)
    is_new = not folder.exists()
    require_writable_folder(folder)  # before the time is spent
    try:
        tokenizer = train_bpe(read_texts(inputs, key, skip), vocab_size, show_progress)
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
    return size
