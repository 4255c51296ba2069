"""The last stage of a datatrove pipeline: documents to token files (optional extra ``megagap[curate]``).

Each task of an executor (local, Slurm, Ray) writes one pair, ``PREFIX-{rank}-of-{tasks}_text_document``, which
``megagap merge`` merges::

    LocalPipelineExecutor(
        pipeline=[JsonlReader("crawl/"), GopherQualityFilter(), TokenFileWriter("web", "llama3/tokenizer.model")],
        tasks=64,
    ).run()
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from megagap.data.format import best_dtype
from megagap.data.manifest import Arguments, FileRecord, LeftOut, Manifest, tokenizer_record, versions
from megagap.data.partial import (
    PartialPair,
    Position,
    making_pair,
    partial_path,
    publish_pair,
    write_index,
    writing_pair,
)
from megagap.errors import DataError
from megagap.files import write_text
from megagap.preprocess.encoder import EncodedTexts, Encoder
from megagap.tokenizer import SpecialTokens, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from datatrove.data import Document, DocumentsPipeline

BATCH_CHARACTERS = 1 << 20


class TokenFileWriter(PipelineStep):
    """Writes the texts of documents, and passes the documents on.

    ``tokenizer`` is a specification for :func:`load_tokenizer`; ``special_tokens`` says whether special tokens that
    are written out in a text are text or tokens. A task that fails leaves no file; datatrove runs it again. Raises
    :class:`DataError` as preprocessing does.
    """

    name = "megagap token files"
    type = "🔢 - TOKENIZER"

    def __init__(
        self,
        output_prefix: str,
        tokenizer: str,
        append_eod: bool = True,
        prepend_bos: bool = False,
        min_tokens: int = 0,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        super().__init__()
        self.output_prefix = output_prefix
        self.tokenizer = tokenizer
        self.append_eod = append_eod
        self.prepend_bos = prepend_bos
        self.min_tokens = min_tokens
        self.special_tokens = special_tokens

    def run(self, data: "DocumentsPipeline", rank: int = 0, world_size: int = 1) -> "Iterator[Document]":
        tokenizer = load_tokenizer(
            self.tokenizer, self.special_tokens
        )  # here, as an executor sends this object to its tasks
        if (self.append_eod and tokenizer.eod is None) or (self.prepend_bos and tokenizer.bos is None):
            raise DataError(f"the tokenizer {self.tokenizer} lacks the special token to add to each document")
        bos, eod = (tokenizer.bos if self.prepend_bos else None), (tokenizer.eod if self.append_eod else None)
        encoder = Encoder(tokenizer, ["text"], bos, eod, self.min_tokens)
        prefix = f"{self.output_prefix}-{rank:05}-of-{world_size:05}_text_document"
        dtype = best_dtype(tokenizer.vocab_size)
        counts: Counter[str] = Counter()
        with making_pair(prefix):
            with writing_pair(prefix):
                pair = PartialPair(prefix, dtype)
            with pair:
                for batch in _batches(data):
                    with writing_pair(prefix):
                        self._write(pair, encoder, batch, counts)
                    yield from batch
                with writing_pair(prefix):
                    position = pair.sync()
            with writing_pair(prefix):
                self._publish(prefix, tokenizer, dtype, position, counts, f"{rank}/{world_size}")

    def _write(self, pair: PartialPair, encoder: Encoder, batch: "list[Document]", counts: "Counter[str]") -> None:
        with self.track_time(unit="batch"):
            names = [str(document.id) for document in batch]
            texts: EncodedTexts = encoder.encode_documents([document.text for document in batch], names)
            pair.add_documents(texts.tokens, texts.lengths)
        counts.update(
            characters=texts.characters, bytes=texts.bytes, empty=texts.empty, short=texts.short, special=texts.special
        )
        self.stat_update("tokens", value=len(texts.tokens))
        self.stat_update("documents", value=len(texts.lengths))

    def _publish(
        self,
        prefix: str,
        tokenizer: Tokenizer,
        dtype: np.dtype[Any],
        position: Position,
        counts: "Counter[str]",
        shard: str,
    ) -> None:
        files = write_index(prefix, dtype, position)
        left_out = LeftOut(empty=counts["empty"], short=counts["short"], duplicate=0, malformed={}, first_malformed=[])
        manifest = Manifest(
            key="text",
            dtype=dtype.name,
            documents=position.documents,
            tokens=position.tokens,
            characters=counts["characters"],
            text_bytes=counts["bytes"],
            special_tokens_in_texts=counts["special"],
            left_out=left_out,
            tokenizer=tokenizer_record(tokenizer),
            arguments=Arguments(
                append_eod=self.append_eod,
                prepend_bos=self.prepend_bos,
                min_tokens=self.min_tokens,
                dedup=False,
                shuffle_documents=None,
                shard=shard,
                on_error="stop",
                special_tokens=tokenizer.special_tokens,
            ),
            inputs=[],
            files={ending: FileRecord(**asdict(file)) for ending, file in files.items()},
            versions=versions(),
        )
        write_text(partial_path(prefix, "manifest"), manifest.model_dump_json(indent=2) + "\n")
        publish_pair(prefix)


def _require_text(document: "Document") -> None:
    """Raises :class:`DataError` naming a document whose text is not valid."""
    try:
        document.text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise DataError(f"the document {document.id!r} has no text that can be encoded: {error}") from None


def _batches(documents: "DocumentsPipeline") -> "Iterator[list[Document]]":
    batch: list[Document] = []
    characters = 0
    for document in documents:
        _require_text(document)
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch
