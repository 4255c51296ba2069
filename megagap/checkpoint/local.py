"""Frequent checkpoints on the nodes' own disks, each rank's file also on the disk of another node.

A node that is lost takes its disk with it: the copy of what its ranks own is at the next node, in a ring. All ranks
write, send, receive and verify, then agree by one exchange that every file is twice on disk; then each node renames its
folder. A start gathers what the disks hold, takes the newest checkpoint of which every file is somewhere, intact, and
fetches the files that a node needs and has not. Where files lie is in ``node_folders.py``, whose they are in
``lineage.py``.

Every method is collective. Faults are told to all ranks, so that all raise, or none.
"""

import logging
import os
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from megagap.checkpoint import node_folders
from megagap.checkpoint.file_exchange import Transfer, exchange_files
from megagap.checkpoint.index import INDEX_NAME, Index, StoredFile
from megagap.checkpoint.lineage import Lineage
from megagap.checkpoint.load import files_of
from megagap.checkpoint.node_folders import Key, Part
from megagap.checkpoint.save import (
    UNFINISHED,
    Entry,
    FilePlan,
    collect_tensors,
    reason_of,
    step_folder_name,
    step_folders,
    step_of,
    write_rank,
)
from megagap.checkpoint.verify import verify_file
from megagap.errors import CheckpointError, ConfigError, MegagapError, system_reason
from megagap.files import partial_name, publish, require_writable_folder, write_bytes, write_text
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Slice

KEPT = 2
"""Steps that a node keeps: a node may commit one that another one, lost at that moment, does not."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nodes:
    """Which ranks share a disk."""

    of_rank: tuple[int, ...]
    """The node of each rank; nodes are numbered in the order of their first ranks."""

    @classmethod
    def named(cls, names: Sequence[str]) -> "Nodes":
        """Of each rank's name of its node."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return cls(tuple(numbers[name] for name in names))

    @property
    def number(self) -> int:
        return max(self.of_rank) + 1

    def ranks(self, node: int) -> list[int]:
        return [rank for rank, its in enumerate(self.of_rank) if its == node]

    def peer(self, rank: int) -> int:
        """The rank of the next node that keeps a copy of this one's file; itself where there is one node."""
        node = self.of_rank[rank]
        theirs = self.ranks((node + 1) % self.number)
        return theirs[self.ranks(node).index(rank) % len(theirs)]


@dataclass(frozen=True)
class _Written:
    """What one rank reports of its file."""

    file: StoredFile | None = None
    """None where the rank owns nothing."""
    entries: tuple[Entry, ...] = ()
    fault: str | None = None


@dataclass(frozen=True)
class Found:
    """A checkpoint that the nodes have together."""

    key: Key
    index: Index
    holders: Mapping[int, Mapping[str, str]]
    """By node, where its disk has intact files: their folders, relative to the run's."""


@dataclass
class LocalTier:
    """A run's checkpoints on the nodes' disks, as one rank sees them."""

    root: Path
    """The run's folder on this node's disk."""
    lineage: Lineage
    nodes: Nodes
    mesh: Mesh
    is_shared: bool = False
    """Whether nodes see each other's folders: copies would be of no use."""
    marks: set[str] = field(default_factory=set)
    """What the nodes of this start have written into their folders."""
    found: Found | None = None
    """What :meth:`newest` has chosen."""
    communicator: DistributedCommunicator = field(init=False)

    def __post_init__(self) -> None:
        self.communicator = DistributedCommunicator(self.mesh)
        self.rank = self.mesh.world.rank
        self.node = self.nodes.of_rank[self.rank]
        self.folder = node_folders.node_folder(self.root, self.node)
        """Where this node writes."""
        self.is_leader = self.nodes.ranks(self.node)[0] == self.rank

    @classmethod
    def open(cls, directory: str, run: Path, node: str, mesh: Mesh) -> "LocalTier":
        """``directory``: ``checkpoint.local_dir``; variables of the environment in it are each node's own. ``run``: the
        run directory, which rank 0 may write. ``node``: a name that all ranks of this rank's node give.

        Raises :class:`ConfigError` on all ranks if a node cannot write there, :class:`CheckpointError` or
        :class:`DataError` if the run's identity cannot be read.
        """
        communicator = DistributedCommunicator(mesh)
        lineage: Lineage | MegagapError | None = None
        if communicator.rank == 0:
            try:
                lineage = Lineage.of_run(run)
            except MegagapError as error:
                lineage = error
        lineage = cast("Lineage | MegagapError", communicator.broadcast(lineage))
        if isinstance(lineage, MegagapError):
            raise lineage
        nodes = Nodes.named(cast("list[str]", communicator.broadcast(communicator.gather(node))))
        name = cast("str", communicator.broadcast(lineage.folder_name(run) if communicator.rank == 0 else None))
        tier = cls(Path(os.path.expandvars(directory)).expanduser() / name, lineage, nodes, mesh)
        tier._prepare(directory)
        log.log(logging.WARNING if tier.is_shared else logging.INFO, "%s", tier.note())
        return tier

    def _prepare(self, directory: str) -> None:
        """Make this node's folder, remove what killed runs left in it, and find out who sees whose."""
        mark = f"{self.lineage.identity} {len(self.lineage.starts)} {os.getpid()} {socket.gethostname()} {self.node}\n"
        fault = None
        if self.is_leader:
            try:
                if "$" in str(self.root.parent):  # which expandvars has left as it is
                    raise ConfigError(f"a variable in {self.root.parent} is not set in the environment")
                require_writable_folder(self.folder, ConfigError)
                node_folders.remove_unfinished(self.folder)
                write_text(self.folder / node_folders.IN_USE, mark)
            except ConfigError as error:
                fault = f"on {socket.gethostname()}: {error.args[0]}"
            except OSError as error:
                fault = f"on {socket.gethostname()}: {error.filename}: {system_reason(error)}"
        answers = self.communicator.gather((mark, fault) if self.is_leader else None)
        told = cast("list[tuple[str, str | None]]", self.communicator.broadcast([a for a in answers or [] if a]))
        if faults := [fault for _, fault in told if fault]:
            raise ConfigError(
                f"checkpoint.local_dir {directory} cannot be used {'; '.join(faults)}\n"
                '  it must be a folder that each node can write; "" for none.'
            )
        self.marks = {mark for mark, _ in told}
        seen = 0
        if self.is_leader:
            seen = sum(self._is_in_use(folder) for folder in node_folders.node_folders(self.root))
        counts = cast("list[int]", self.communicator.gather(seen) or [])
        self.is_shared = bool(self.communicator.broadcast(max(counts, default=0) > 1))

    def _is_in_use(self, folder: Path) -> bool:
        """Whether a node of this start writes there, as far as this node sees."""
        return _text(folder / node_folders.IN_USE) in self.marks

    @property
    def copies(self) -> bool:
        """Whether files are sent to a peer."""
        return self.nodes.number > 1 and not self.is_shared

    def note(self) -> str:
        """What a user should know of where checkpoints go."""
        if self.copies:
            return f"local checkpoints in {self.folder}, with copies on the next of {self.nodes.number} nodes"
        why = "all nodes see that folder" if self.is_shared else "there is one node"
        return f"local checkpoints in {self.folder}, without copies on another node: {why}"

    # Finding

    def newest(self, after: int) -> Path | None:
        """The newest checkpoint of a step above ``after`` of which the nodes have every file intact; None without one.

        That is this node's folder for it; :meth:`fetch` completes it.
        Raises :class:`CheckpointError` if a node cannot write its index.
        """
        parts: list[Part] = []
        if self.is_leader:
            parts, faults = node_folders.find_parts(self.root)
            for fault in faults:
                log.warning("not used: %s", fault)
        gathered = cast("list[list[Part]] | None", self.communicator.gather(parts))
        candidates = self._candidates(gathered, after) if gathered is not None else []
        for number in range(cast("int", self.communicator.broadcast(len(candidates)))):
            key = cast("Key", self.communicator.broadcast(candidates[number] if candidates else None))
            self.found = self._verified(key, gathered)
            if self.found is not None:
                return self.folder / step_folder_name(key.step)
        return None

    def _candidates(self, gathered: Sequence[Sequence[Part]], after: int) -> list[Key]:
        """Of what all nodes have (on rank 0): the checkpoints whose files are all there, the newest first."""
        present: dict[Key, set[str]] = {}
        total: dict[Key, int] = {}
        for part in (part for parts in gathered for part in parts):
            if part.key.step > after and self.lineage.has_gone_through(part.start, part.key.step):
                present.setdefault(part.key, set()).update(part.present)
                total[part.key] = part.total
        for key in present:
            if len(present[key]) < total[key]:
                missing = total[key] - len(present[key])
                log.warning("the local checkpoint of step %d lacks %d of %d files", key.step, missing, total[key])
        whole = [key for key in present if len(present[key]) == total[key]]
        return sorted(whole, key=lambda key: (-key.step, key.index))

    def _verified(self, key: Key, gathered: Sequence[Sequence[Part]] | None) -> Found | None:
        """Verify every file of a candidate, each node its own. None if one has no intact copy left."""
        teller = None
        if gathered is not None:
            teller = next(rank for rank, parts in enumerate(gathered) if any(part.key == key for part in parts))
        teller = cast("int", self.communicator.broadcast(teller))
        here = node_folders.folders_of(self.root, key)
        here.sort(key=lambda folder: folder.parent != self.folder)
        own_text = None
        if self.rank == teller:
            with suppress(OSError, LookupError):  # it was there when it was found
                own_text = (here[0] / INDEX_NAME).read_bytes()
        texts = self.communicator.gather(own_text)
        text = cast("bytes | None", self.communicator.broadcast(texts[teller] if texts is not None else None))
        if text is None:
            log.warning("the local checkpoint of step %d is not used: its index cannot be read any more", key.step)
            return None
        index = Index.parse(self.folder / step_folder_name(key.step), text, whole=False)

        ranks = self.nodes.ranks(self.node)
        mine = sorted(file.name for file in index.files)[ranks.index(self.rank) :: len(ranks)]
        places = {name: _intact(index, name, here) for name in mine}
        own = {name: str(folder.relative_to(self.root)) for name, folder in places.items() if folder is not None}
        answers = cast("list[dict[str, str]] | None", self.communicator.gather(own))
        holders: dict[int, dict[str, str]] = {}
        for rank, intact in enumerate(answers or []):
            holders.setdefault(self.nodes.of_rank[rank], {}).update(intact)
        holders = cast("dict[int, dict[str, str]]", self.communicator.broadcast(holders))
        lost = {file.name for file in index.files} - {name for intact in holders.values() for name in intact}
        if lost:
            log.warning("the local checkpoint of step %d is not used: %s is damaged", key.step, ", ".join(sorted(lost)))
            return None
        self._put_index(key, text)
        return Found(key, index, holders)

    def _put_index(self, key: Key, text: bytes) -> None:
        """Make this node's folder for a checkpoint, unless it has it; another checkpoint of that step is removed."""
        folder, fault = self.folder / step_folder_name(key.step), None
        if self.is_leader:
            try:
                if folder.exists() and node_folders.key_of(key.step, _bytes(folder / INDEX_NAME)) != key:
                    node_folders.remove(folder)
                folder.mkdir(exist_ok=True)
                if not (folder / INDEX_NAME).exists():
                    write_bytes(folder / INDEX_NAME, text)
            except OSError as error:
                fault = f"cannot write {folder} on {socket.gethostname()}: {system_reason(error)}"
        self._raise_everywhere(fault)

    # Loading

    def fetch(self, wanted: Iterable[Slice]) -> None:
        """Get the files of :attr:`found` that this rank needs to load ``wanted`` into its node's folder.

        Raises :class:`CheckpointError` if one cannot be sent, written, or arrives damaged.
        """
        assert self.found is not None
        found, folder = self.found, self.folder / step_folder_name(self.found.key.step)
        try:
            needed = files_of(folder, found.index, wanted)
        except CheckpointError:  # a tensor is missing: who loads it says so
            needed = set()
        needs = self.communicator.gather(needed)
        plan = self._plan(cast("list[set[str]]", needs)) if needs is not None else None
        moves, transfers = cast("tuple[dict[int, list[str]], list[Transfer]]", self.communicator.broadcast(plan))
        own, faults = found.holders.get(self.node, {}), []
        if self.is_leader:  # a disk that was another node's, or is shared: no need to send
            for name in moves.get(self.node, []):
                try:
                    _link(self.root / own[name] / name, folder / name)
                except OSError as error:
                    faults.append(f"cannot write {folder / name} on {socket.gethostname()}: {system_reason(error)}")

        def path_of(name: str) -> Path:
            return self.root / own[name] / name if name in own else partial_name(folder / name)

        faults += filter(None, [exchange_files(transfers, self.mesh, path_of)])
        for transfer in transfers:
            if transfer.receiver == self.rank:
                try:
                    verify_file(path_of(transfer.name), found.index, transfer.name)
                    publish(path_of(transfer.name), folder / transfer.name)
                except (CheckpointError, OSError) as error:
                    path_of(transfer.name).unlink(missing_ok=True)
                    faults.append(reason_of(error))
        self._raise_everywhere("; ".join(faults) or None)
        if transfers:
            log.info("fetched %d files of the local checkpoint of step %d", len(transfers), found.key.step)

    def _plan(self, needs: Sequence[set[str]]) -> tuple[dict[int, list[str]], list[Transfer]]:
        """From what each rank needs (on rank 0): what each node takes from another folder of its disk, and what is
        sent. Each file goes to a node once; the ranks of a node share the work."""
        assert self.found is not None
        holders, sizes = self.found.holders, {file.name: file.size for file in self.found.index.files}
        moves: dict[int, list[str]] = {}
        transfers = []
        step = step_folder_name(self.found.key.step)
        for node in range(self.nodes.number):
            ranks, own = self.nodes.ranks(node), holders.get(node, {})
            in_place = str((node_folders.node_folder(self.root, node) / step).relative_to(self.root))
            for number, name in enumerate(sorted(set().union(*(needs[rank] for rank in ranks)))):
                if name in own:
                    if own[name] != in_place:
                        moves.setdefault(node, []).append(name)
                    continue
                nodes = [other for other, files in sorted(holders.items()) if name in files]
                senders = [rank for other in nodes for rank in self.nodes.ranks(other)]
                transfers.append(
                    Transfer(name, sizes[name], senders[number % len(senders)], ranks[number % len(ranks)])
                )
        return moves, transfers

    # Saving

    def begin(self, step: int) -> None:
        """The run goes on after ``step``, as its lineage says: later local checkpoints are of steps that it makes
        anew."""
        self.lineage = self.lineage.after_start_at(step)
        if self.is_leader:
            self._remove([folder for folder in step_folders(self.folder) if step_of(folder) > step])

    def save_or_warn(self, step: int, slices: Iterable[Slice], state: Mapping[str, Any], run: RunDirectory) -> None:
        """:meth:`save`, logged and recorded. Where it fails, it is a warning: training goes on."""
        try:
            folder = self.save(step, slices, state)
        except CheckpointError as error:
            log.warning("%s", error.args[0])
            run.event("local_checkpoint_failed", reason=error.args[0])
        else:
            run.event("local_checkpoint", folder=str(folder))
            log.info("local checkpoint %s", folder)

    def save(self, step: int, slices: Iterable[Slice], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint as ``save_checkpoint`` does. Returns this node's folder of it.

        Raises :class:`CheckpointError` on every rank, and leaves nothing behind, if one of them fails: older ones stay.
        """
        folder = self.folder / step_folder_name(step)
        partial = folder.with_name(UNFINISHED + folder.name)
        try:
            partial.mkdir(exist_ok=True)
            outcome = write_rank(partial / _file_name(self.rank), FilePlan.of(slices), self.mesh.spans.move)
            written = _Written(outcome.file, outcome.entries)
        # Whatever it is, the other ranks must be told instead of waiting.
        except Exception as error:
            written = _Written(fault=f"rank {self.rank}: {reason_of(error)}")
        text, fault = cast("tuple[str, str | None]", self.communicator.broadcast(self._index_text(written, state)))
        if fault is None:
            fault = self._complete(partial, text)
        try:
            self._raise_everywhere(fault)
        except CheckpointError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"no local checkpoint of step {step} was written\n  {error.args[0]}") from None
        if self.is_leader:
            try:
                if folder.exists():
                    node_folders.remove(folder)
                publish(partial, folder)
                self._remove_old()
            except OSError as error:  # other nodes have it, and perhaps all of it
                log.warning("%s was not written: %s", folder, system_reason(error))
        return folder

    def _index_text(self, written: _Written, state: Mapping[str, Any]) -> tuple[str, str | None] | None:
        """On rank 0: the index of what all ranks have written, or their faults."""
        parts = cast("list[_Written] | None", self.communicator.gather(written))
        if parts is None:
            return None
        faults = [part.fault for part in parts if part.fault]
        if faults:
            return "", "\n  ".join(faults)
        try:
            tensors = collect_tensors(entry for part in parts for entry in part.entries)
            files = tuple(part.file for part in parts if part.file)
            index = Index(files=files, tensors=tensors, state={**state, "start": len(self.lineage.starts)})
            index.validate_against(self.folder, whole=False)
            return index.to_json(), None
        except Exception as error:
            return "", reason_of(error)

    def _complete(self, partial: Path, text: str) -> str | None:
        """Write the index, and send this rank's file to its peer. Returns what went wrong on this rank."""
        faults = []
        if self.is_leader:
            try:
                write_text(partial / INDEX_NAME, text)
            except OSError as error:
                faults.append(f"cannot write {partial / INDEX_NAME}: {system_reason(error)}")
        if self.copies:
            index = Index.parse(partial, text.encode(), whole=False)
            sizes = {file.name: file.size for file in index.files}
            transfers = [
                Transfer(_file_name(rank), sizes[_file_name(rank)], rank, self.nodes.peer(rank))
                for rank in range(self.communicator.size)
                if _file_name(rank) in sizes
            ]
            faults += filter(None, [exchange_files(transfers, self.mesh, lambda name: partial / name)])
            for transfer in transfers:
                if transfer.receiver == self.rank and not faults:
                    try:
                        verify_file(partial / transfer.name, index, transfer.name)
                    except CheckpointError as error:
                        faults.append(str(error.args[0]))
        return f"rank {self.rank}: {'; '.join(faults)}" if faults else None

    def _remove_old(self) -> None:
        """All but the newest steps; once there are so many, also folders of nodes that no longer write here."""
        steps = step_folders(self.folder)
        doomed = steps[:-KEPT]
        if len(steps) >= KEPT:
            others = [other for other in node_folders.node_folders(self.root) if not self._is_in_use(other)]
            doomed += [step for other in others for step in step_folders(other)]
        self._remove(doomed)

    def _remove(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            try:
                node_folders.remove(folder)
            except OSError as error:
                log.warning("cannot remove the old local checkpoint %s: %s", folder, error.strerror or error)

    def _raise_everywhere(self, fault: str | None) -> None:
        """Raises :class:`CheckpointError` on every rank if one has a fault."""
        answers = self.communicator.gather(fault)
        faults = None if answers is None else "\n  ".join(str(answer) for answer in answers if answer)
        if faults := cast("str", self.communicator.broadcast(faults)):
            raise CheckpointError(faults)


def _file_name(rank: int) -> str:
    return f"rank_{rank:05}.safetensors"


def _intact(index: Index, name: str, folders: Iterable[Path]) -> Path | None:
    """The first of the folders whose file of this name is as the index says. Damaged ones are logged."""
    for folder in folders:
        if (folder / name).exists():
            try:
                verify_file(folder / name, index, name)
                return folder
            except CheckpointError as error:
                log.warning("not used: %s", error.args[0])
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the disk has no such thing. Raises OSError."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
