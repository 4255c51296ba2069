"""The last stage of a datatrove pipeline: documents to token files (optional extra ``megagap[curate]``).

Each task of an executor (local, Slurm, Ray) writes one pair, ``PREFIX-{rank}-of-{tasks}_text_document``, which
``tools/merge_datasets.py`` puts together::

    LocalPipelineExecutor(
        pipeline=[JsonlReader("crawl/"), GopherQualityFilter(), TokenFileWriter("web", "llama3/tokenizer.model")],
        tasks=64,
    ).run()
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from datatrove.pipeline.base import PipelineStep

from megagap.data.encoder import EncodedTexts, Encoder
from megagap.data.format import best_dtype
from megagap.data.manifest import Arguments, FileRecord, LeftOut, Manifest, tokenizer_record, versions
from megagap.data.partial import (
    PartialPair,
    lock_pair,
    partial_path,
    publish_pair,
    remove_partial,
    write_index,
    writing_pair,
)
from megagap.data.tokenizer import load_tokenizer
from megagap.errors import DataError
from megagap.files import write_text

if TYPE_CHECKING:
    from datatrove.data import Document, DocumentsPipeline

BATCH_CHARACTERS = 1 << 20


class TokenFileWriter(PipelineStep):
    """Writes the texts of documents, and passes the documents on.

    ``tokenizer`` is a specification for :func:`load_tokenizer`. A task that fails leaves no file; datatrove runs it
    again. Raises :class:`DataError` as preprocessing does.
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
    ) -> None:
        super().__init__()
        self.output_prefix = output_prefix
        self.tokenizer = tokenizer
        self.append_eod = append_eod
        self.prepend_bos = prepend_bos
        self.min_tokens = min_tokens

    def run(self, data: "DocumentsPipeline", rank: int = 0, world_size: int = 1) -> "Iterator[Document]":
        tokenizer = load_tokenizer(self.tokenizer)  # here, as an executor sends this object to its tasks
        if (self.append_eod and tokenizer.eod is None) or (self.prepend_bos and tokenizer.bos is None):
            raise DataError(f"the tokenizer {self.tokenizer} lacks the special token to put around documents")
        bos, eod = (tokenizer.bos if self.prepend_bos else None), (tokenizer.eod if self.append_eod else None)
        encoder = Encoder(tokenizer, ["text"], bos, eod, self.min_tokens)
        prefix = f"{self.output_prefix}-{rank:05}-of-{world_size:05}_text_document"
        dtype = best_dtype(tokenizer.vocab_size)
        counts: Counter[str] = Counter()
        lock = lock_pair(prefix)
        try:
            with writing_pair(prefix):
                remove_partial(prefix)
                pair = PartialPair(prefix, dtype)
            with pair:
                batch: list[Document] = []
                characters = 0
                for document in data:
                    batch.append(document)
                    characters += len(document.text)
                    if characters >= BATCH_CHARACTERS:
                        self._write(pair, encoder, batch, counts)
                        yield from batch
                        batch, characters = [], 0
                self._write(pair, encoder, batch, counts)
                yield from batch
                with writing_pair(prefix):
                    position = pair.sync()
                    files = write_index(prefix, dtype, position)
            manifest = Manifest(
                key="text",
                dtype=dtype.name,
                documents=position.documents,
                tokens=position.tokens,
                characters=counts["characters"],
                left_out=LeftOut(
                    empty=counts["empty"], short=counts["short"], duplicate=0, malformed={}, first_malformed=[]
                ),
                tokenizer=tokenizer_record(tokenizer),
                arguments=Arguments(
                    append_eod=self.append_eod,
                    prepend_bos=self.prepend_bos,
                    min_tokens=self.min_tokens,
                    dedup=False,
                    shuffle_documents=None,
                    shard=f"{rank}/{world_size}",
                    on_error="stop",
                ),
                inputs=[],
                files={ending: FileRecord(**asdict(file)) for ending, file in files.items()},
                versions=versions(),
            )
            with writing_pair(prefix):
                write_text(partial_path(prefix, "manifest"), manifest.model_dump_json(indent=2) + "\n")
                publish_pair(prefix)
        finally:
            remove_partial(prefix)
            lock.release()

    def _write(self, pair: PartialPair, encoder: Encoder, batch: "list[Document]", counts: "Counter[str]") -> None:
        with self.track_time(unit="batch"), writing_pair(pair.prefix):
            texts: EncodedTexts = encoder.encode_documents([document.text for document in batch])
            pair.add_documents(texts.tokens, texts.lengths)
        counts.update(characters=texts.characters, empty=texts.empty, short=texts.short)
        self.stat_update("tokens", value=len(texts.tokens))
        self.stat_update("documents", value=len(texts.lengths))
