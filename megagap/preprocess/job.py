"""A run: from inputs to published pairs, or from where a killed run stopped."""

import logging
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagap.data.format import best_dtype
from megagap.data.manifest import (
    Arguments,
    FileRecord,
    InputRecord,
    LeftOut,
    Manifest,
    UnreadRecord,
    read_manifest,
    tokenizer_record,
    versions,
)
from megagap.data.origins import lines_before
from megagap.data.partial import (
    CannotWriteError,
    PartialPair,
    Position,
    cannot_write,
    checksum_of,
    partial_path,
    publish_pair,
    remove_partial,
    write_index,
)
from megagap.errors import DataError, counted, printable
from megagap.files import reading, write_text
from megagap.preprocess.arrange import arrange, take_over
from megagap.preprocess.documents import fault_in
from megagap.preprocess.encoder import REPORTED, EncodedTexts, EncodedUnit, Encoder
from megagap.preprocess.fast import Fast, choose_encoder
from megagap.preprocess.inputs import Input
from megagap.preprocess.journal import Journal, PairState, State, check_inputs, inputs_entry, read_journal
from megagap.preprocess.listing import Unread
from megagap.preprocess.progress import Progress
from megagap.preprocess.units import Unit, read_units
from megagap.preprocess.workers import map_in_order
from megagap.tokenizer import Tokenizer

log = logging.getLogger(__name__)

KEPT = "The work done so far is kept: the same command with --resume continues it."

JOURNAL_SECONDS = 10.0
"""Between two entries of the journal: the most work that a kill may lose."""

THREADS = 4
"""Of a process, where a tokenizer's library has threads: they share its tables and caches, which makes each faster."""


class Job:
    """Makes the pairs ``prefixes``, whose locks the caller holds, one for each of ``keys``.

    ``unread`` are files beside ``inputs`` that are not read, for the manifests.
    """

    def __init__(
        self,
        inputs: list[Input],
        unread: list[Unread],
        prefixes: list[str],
        keys: list[str],
        tokenizer: Tokenizer,
        arguments: Arguments,
    ) -> None:
        self._inputs = inputs
        self._unread = unread
        self._prefixes = prefixes
        self._keys = keys
        self._tokenizer = tokenizer
        self._arguments = arguments
        self._record = tokenizer_record(tokenizer)
        self._dtype = best_dtype(tokenizer.vocab_size)
        self._journal_path = partial_path(prefixes[0], "journal")
        self.notes: list[str] = []
        """What the user should know."""
        self.content_read = 0
        """Bytes of the inputs that this run read, uncompressed."""
        self.was_finished = False
        """An earlier run had made everything."""

    def __call__(self, fast: Fast, workers: int, resume: bool, show_progress: bool) -> list[Manifest]:
        """The manifests of the pairs. Raises :class:`DataError`."""
        pipe = next((file.path for file in self._inputs if file.size is None), None)
        if resume and pipe:
            raise DataError(f"{pipe} is not a regular file and can be read only once: --resume does not apply to it")
        state = None
        if resume:
            state = self._interrupted()
            if state is None and (manifests := self.finished()):
                self._remove_partial()
                return manifests
        if state is None:
            removed = [prefix for prefix in self._prefixes if remove_partial(prefix)]
            if removed and not resume:
                self.notes.append(
                    f"removed what an unfinished run left of {removed[0]}; --resume would have continued it"
                )
        plan = None if state else self._plan()
        state = state or State([PairState() for _ in self._prefixes])
        journal = None
        try:
            journal = Journal(self._journal_path, plan)
            self._work(state, journal, fast, workers, show_progress)
        except BaseException as error:
            can_go_on = journal is not None and journal.has_progress and not pipe
            if not can_go_on:
                self._remove_partial()
            if isinstance(error, OSError):
                error = cannot_write(self._prefixes[0], error)
            if isinstance(error, DataError) and can_go_on:
                error = DataError(f"{error.args[0]}\n  {KEPT}")
            elif can_go_on:
                log.warning(KEPT)
            raise error from None
        finally:
            if journal is not None:
                journal.close()
        return [manifest for prefix in self._prefixes if (manifest := read_manifest(prefix))]

    def _remove_partial(self) -> None:
        """As far as the system allows it: nothing depends on it."""
        for prefix in self._prefixes:
            with suppress(CannotWriteError):
                remove_partial(prefix)

    def _plan(self) -> dict[str, Any]:
        arguments = self._arguments.model_dump(exclude={"on_error"})  # which may be changed when continuing
        return {
            "arguments": arguments | {"keys": self._keys},
            "tokenizer": self._record.model_dump(exclude={"spec"}),
            "inputs": inputs_entry(self._inputs),
        }

    def _interrupted(self) -> State | None:
        """Where an interrupted run stood. Raises :class:`DataError` if it was to do something else."""
        found = read_journal(self._journal_path)
        if found is None:
            return None
        before, state = found
        now = self._plan()
        for what in ("arguments", "tokenizer"):
            for name, value in now[what].items():
                if before[what].get(name) != value:
                    raise DataError(
                        f"the interrupted run had {name.replace('_', ' ')} = {before[what].get(name)!r}, this one has "
                        f"{value!r}\n  give the same {what} to continue, or start again without --resume."
                    )
        check_inputs(before["inputs"], self._inputs, state)
        return state

    def finished(self) -> list[Manifest] | None:
        """The manifests of the pairs, if these are all there and made from the same inputs in the same way.

        Needs no lock, and writes nothing. Raises :class:`DataError` for an input that cannot be read.
        """
        manifests = []
        for prefix, key in zip(self._prefixes, self._keys, strict=True):
            try:
                manifest = read_manifest(prefix)
            except DataError:
                return None
            if manifest is None or not all(Path(prefix + ending).exists() for ending in manifest.files):
                return None
            # Earlier versions did not record these.
            effective = manifest.tokenizer.effective or self._record.effective
            same = {"on_error": self._arguments.on_error, "special_tokens": manifest.special_tokens}
            if (
                manifest.key != key
                or manifest.arguments.model_copy(update=same) != self._arguments
                or manifest.tokenizer.model_copy(update={"spec": self._record.spec, "effective": effective})
                != self._record
                or [(i.path, i.size, i.start, i.stop) for i in manifest.inputs]
                != [(printable(i.path), i.size, i.start, i.stop) for i in self._inputs]
            ):
                return None
            manifests.append(manifest)
        sums = [record.checksum for record in manifests[0].inputs]
        if not all(map(_has_checksum, self._inputs, sums)):
            return None
        self.was_finished = True
        self.notes.append("finished already, by an earlier run from the same inputs: nothing was done")
        return manifests

    def _work(self, state: State, journal: Journal, fast: Fast, workers: int, show_progress: bool) -> None:
        if not state.is_read:
            self._read(state, journal, fast, workers, show_progress)
        elif not state.is_complete:
            self._check(state)
        if not state.is_complete:
            self._arrange(state, journal)
            for i, prefix in enumerate(self._prefixes):
                position, duplicates = state.arranged.get(i, (state.pairs[i].position, 0))
                manifest = self._manifest(i, state, position, duplicates)
                write_text(partial_path(prefix, "manifest"), manifest.model_dump_json(indent=2) + "\n")
            state.is_complete = True
            journal.record(state)
        for prefix in reversed(self._prefixes):  # the first, which has the journal, last
            publish_pair(prefix)

    def _check(self, state: State) -> None:
        """Refuse partial files that were damaged since all was read."""
        for i, prefix in enumerate(self._prefixes):
            if i in state.arranged:
                take_over(prefix)
            position, _ = state.arranged.get(i, (state.pairs[i].position, 0))
            PartialPair(prefix, self._dtype, position).close()

    def _read(self, state: State, journal: Journal, fast: Fast, workers: int, show_progress: bool) -> None:
        """Read all inputs and write their tokens."""
        arguments = self._arguments
        tokenizer, note = choose_encoder(self._tokenizer, fast, self._inputs, self._keys)
        if note:
            self.notes.append(note)
        bos = self._tokenizer.bos if arguments.prepend_bos else None
        eod = self._tokenizer.eod if arguments.append_eod else None
        encoder = Encoder(tokenizer, self._keys, bos, eod, arguments.min_tokens)
        units = read_units(self._inputs, self._keys, tokenizer.splits_at_spaces, state.mark)
        results: Generator[tuple[Unit, EncodedUnit], None, None]
        if workers == 1:
            results = ((unit, encoder(unit)) for unit in units)
        else:
            threads = min(workers, THREADS) if tokenizer.uses_threads else 1
            results = map_in_order(encoder, units, -(-workers // threads), threads, _place_of)
        done = sum(file.share for file in self._inputs[: state.mark.input])
        total = sum(file.share for file in self._inputs)
        name = Path(self._prefixes[0]).name
        with ExitStack() as stack, Progress(name, total, done, show_progress) as progress:
            stack.enter_context(closing(results))  # ends the workers at once on an error
            writers = []
            for prefix, pair_state in zip(self._prefixes, state.pairs, strict=True):
                position = pair_state.position if journal.has_progress else None
                pair = stack.enter_context(PartialPair(prefix, self._dtype, position, has_origins=True))
                writers.append(TextWriter(pair, pair_state, bos, eod, arguments.min_tokens))
            recorded = time.monotonic()
            for unit, result in results:
                self._take(state, unit, result, writers)
                progress.add(unit)
                if time.monotonic() - recorded >= JOURNAL_SECONDS and all(writer.can_stop for writer in writers):
                    for writer in writers:
                        writer.sync()
                    journal.record(state)
                    recorded = time.monotonic()
            for writer in writers:
                writer.sync()
        self.content_read = progress.content_bytes
        self._require_documents(state)
        state.is_read = True
        journal.record(state)

    def _take(self, state: State, unit: Unit, result: EncodedUnit, writers: Sequence["TextWriter"]) -> None:
        """Write what came of a unit."""
        is_piece = unit.kind == "text" and not (unit.begins and unit.ends)
        if unit.kind == "text" and len(writers) > 1:
            raise DataError(f"{unit.path} is a plain text, which has only one text: give a single --json-keys")
        if result.faults:
            faults = result.faults[: REPORTED - len(state.first_skipped)]
            stops = self._arguments.on_error == "stop" or is_piece
            if faults or stops:  # only then, as it reads all of the file that is before
                file = self._inputs[unit.input]
                with reading(file.path):
                    before = lines_before(file.path, file.start)
            if stops:
                raise fault_in(unit, result.faults[0], before)
            state.reasons = dict(Counter(state.reasons) + result.reasons)
            state.first_skipped += [fault_in(unit, fault, before).args[0] for fault in faults]
        first_record = state.record_count + (0 if unit.kind == "text" else unit.line - 1)
        for writer, texts in zip(writers, result.texts, strict=False):
            writer.add(unit, texts, first_record)
        if state.content_bytes is not None:
            state.content_bytes += unit.content_size
        state.mark = unit.next
        if unit.file_checksum is not None:
            state.checksums.append(unit.file_checksum)
            state.records.append(unit.records_read)
            state.record_count += unit.records_read
            state.kinds.append(unit.kind)

    def _require_documents(self, state: State) -> None:
        if any(pair.position.documents for pair in state.pairs) or self._arguments.shard:
            return
        skipped = sum(state.reasons.values())
        left_out = sum(pair.empty + pair.short for pair in state.pairs)
        if skipped:
            raise DataError(
                f"none of the {counted(skipped, 'document')} can be used; the first fault:\n  {state.first_skipped[0]}"
            )
        what = f"only documents that are empty or too short ({left_out:,})" if left_out else "no documents"
        more = " …" if self._inputs[3:] else ""
        raise DataError(f"the inputs hold {what}: {', '.join(file.path for file in self._inputs[:3])}{more}")

    def _arrange(self, state: State, journal: Journal) -> None:
        seed, dedup = self._arguments.shuffle_documents, self._arguments.dedup
        if seed is None and not dedup:
            return
        for i, prefix in enumerate(self._prefixes):
            if i not in state.arranged:
                state.arranged[i] = arrange(prefix, self._dtype, seed, dedup)
                journal.record(state)
            take_over(prefix)

    def _manifest(self, i: int, state: State, position: Position, duplicates: int) -> Manifest:
        pair = state.pairs[i]
        written = write_index(self._prefixes[i], self._dtype, position)
        inputs = [
            InputRecord(
                path=file.path,
                size=file.size,
                start=file.start,
                stop=file.stop,
                checksum=checksum,
                kind=kind,
                records=count,
            )
            for file, checksum, kind, count in zip(
                self._inputs, state.checksums, state.kinds, state.records, strict=True
            )
        ]
        return Manifest(
            key=self._keys[i],
            dtype=self._dtype.name,
            documents=position.documents,
            tokens=position.tokens,
            characters=pair.characters,
            text_bytes=None if duplicates else pair.bytes,
            content_bytes=state.content_bytes,
            special_tokens_in_texts=pair.special,
            left_out=LeftOut(
                empty=pair.empty,
                short=pair.short,
                duplicate=duplicates,
                malformed=dict(sorted(state.reasons.items())),
                first_malformed=state.first_skipped,
            ),
            tokenizer=self._record,
            arguments=self._arguments,
            inputs=inputs,
            unread=[UnreadRecord(path=file.path, reason=file.reason) for file in self._unread],
            files={ending: FileRecord(**asdict(file)) for ending, file in written.items()},
            versions=versions(),
        )


def _place_of(unit: Unit) -> str:
    return f"{unit.path}, from {'row' if unit.kind == 'rows' else 'line'} {unit.line:,} on"


class TextWriter:
    """Writes the texts of one key and counts them; puts the pieces of plain texts together."""

    def __init__(self, pair: PartialPair, state: PairState, bos: int | None, eod: int | None, min_tokens: int) -> None:
        self._pair = pair
        self._state = state
        self._around = [np.array([] if i is None else [i], pair.dtype) for i in (bos, eod)]
        self._min_tokens = max(min_tokens, 1)
        self._held: list[NDArray[Any]] = []
        """Pieces of a plain text that has too few tokens so far."""
        self._held_characters = self._held_bytes = 0
        self._held_special = 0

    @property
    def can_stop(self) -> bool:
        """Whether state and files hold everything so far."""
        return not self._held

    def sync(self) -> None:
        self._state.position = self._pair.sync()

    def add(self, unit: Unit, texts: EncodedTexts, first_record: int) -> None:
        """``first_record``: the number of the unit's first record, over all inputs."""
        if unit.kind == "text":
            self._add_piece(unit, texts, first_record)
            return
        self._pair.add_documents(texts.tokens, texts.lengths, first_record + texts.numbers.astype(np.int64))
        self._count(texts.characters, texts.bytes)
        self._state.empty += texts.empty
        self._state.short += texts.short
        self._state.special += texts.special

    def _count(self, characters: int, size: int) -> None:
        self._state.characters += characters
        if self._state.bytes is not None:
            self._state.bytes += size

    def _add_piece(self, unit: Unit, piece: EncodedTexts, record: int) -> None:
        begin, end = self._around
        self._held.append(piece.tokens)
        self._held_characters += piece.characters
        self._held_bytes += piece.bytes
        self._held_special += piece.special
        held = sum(map(len, self._held))
        if self._pair.open_tokens or held >= self._min_tokens:
            if not self._pair.open_tokens:
                self._pair.add_tokens(begin)
            for tokens in self._held:
                self._pair.add_tokens(tokens)
            self._count(self._held_characters, self._held_bytes)
            self._state.special += self._held_special
            self._release()
        if not unit.ends:
            return
        if self._pair.open_tokens:
            self._pair.add_tokens(end)
            self._pair.end_sequence()
            self._pair.end_document(record)
        elif held:
            self._state.short += 1
        else:
            self._state.empty += 1
        self._release()

    def _release(self) -> None:
        self._held, self._held_characters, self._held_bytes, self._held_special = [], 0, 0, 0


def _has_checksum(file: Input, checksum: str) -> bool:
    if file.is_whole:
        with reading(file.path):
            return checksum_of(file.path) == checksum
    found = None
    for unit in read_units([file], [], splits_texts=False):
        found = unit.file_checksum
    return found == checksum
