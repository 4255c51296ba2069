"""All ranks have one recipe and one version of the code, or the run ends before its first collective.

Ranks that differ would hang in groups of different members, or train one model with several settings. So this comes
before the groups of a mesh are made, by way of the store at which the ranks have met.
"""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from megagap.config import Settings
from megagap.errors import OPS_SWITCH, DistributedError, counted, library_errors, ranks_named
from megagap.files import sources_digest
from megagap.ops import compiled
from megagap.process.rendezvous import Process

WAIT = timedelta(minutes=5)
"""How long ranks may be apart here; they have met already."""

LINGER = timedelta(seconds=3)
"""How long a rank that found a difference waits for the others to read of it."""


ENVIRONMENT = (
    OPS_SWITCH,
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
"""Variables that change results, or what ranks must have in common to communicate."""

MOST_LINES = 20
"""Differences to print."""

Facts = dict[str, Any]
"""By a dotted name; JSON values."""

ABSENT = None
"""Of a setting that is not there at all."""


def require_agreement(settings: Settings, process: Process) -> None:
    """Compare settings and version with those of rank 0. Collective, once the ranks have met.

    Raises :class:`DistributedError` on all ranks if any differs; it names what differs, and the ranks.
    """
    if process.world_size == 1:
        return
    store: Store = dist.distributed_c10d._get_default_store()
    with library_errors("the ranks cannot compare their settings", DistributedError):
        found = exchange(facts(settings), process.rank, process.world_size, PrefixStore("agreement", store))
    if found:
        raise DistributedError(explain(found, process.world_size))


def facts(settings: Settings) -> Facts:
    """What must be the same on all ranks."""
    found: Facts = {}
    for section, values in settings.model_dump(mode="json").items():
        _flatten(f"{section}", values, found)
    return found | version()


def version() -> Facts:
    """Of the code, and what else results depend on."""
    return {
        "megagap's sources": sources_digest(),
        "megagap's kernels": "built" if compiled.AVAILABLE else "not used",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{f"environment {name}": os.environ.get(name) for name in ENVIRONMENT},
    }


def _flatten(name: str, value: Any, into: Facts) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(f"{name}.{key}", part, into)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, part in enumerate(value):
            _flatten(f"{name}[{index}]", part, into)
    elif name.startswith("data.") and name.rpartition(".")[2] in ("path", "tokenizer"):
        # Machines may have copies of the data in different places: what the data is, the loader compares.
        into[name] = [_file_name(path) for path in value] if isinstance(value, list) else _file_name(value)
    else:
        into[name] = value


def _file_name(path: str) -> str:
    return PurePath(path).name


Difference = tuple[int, dict[str, tuple[Any, Any]]]
"""A rank, and what it has otherwise: rank 0's value and its own."""


def exchange(own: Facts, rank: int, world_size: int, store: Store) -> list[Difference]:
    """The ranks that differ from rank 0, the same list on every rank. A rank's cost does not depend on their number."""
    if rank == 0:
        store.set("first", json.dumps(own))
    wait = partial(_get, store)
    differences = compare(json.loads(wait("first")), json.loads(json.dumps(own)))
    if differences:
        place = store.add("different", 1) - 1
        store.set(f"different/{place}", json.dumps([rank, differences]))
    if store.add("compared", 1) == world_size:  # the last one
        number = store.add("different", 0)
        found = sorted(json.loads(wait(f"different/{place}")) for place in range(number))
        store.set("verdict", json.dumps(found))
    verdict = json.loads(wait("verdict"))
    if verdict:  # rank 0 may be the store's host: its end would take the verdict from those who have not read it yet
        if store.add("read", 1) == world_size:
            store.set("all read", "")
        with suppress(RuntimeError):
            store.wait(["all read"], LINGER)
    return [(other, {name: (theirs, own) for name, (theirs, own) in found.items()}) for other, found in verdict]


def _get(store: Store, key: str) -> bytes:
    store.wait([key], WAIT)
    return store.get(key)


def compare(first: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs: rank 0's value and one's own."""
    names = [*first, *(name for name in own if name not in first)]
    return {
        name: (first.get(name, ABSENT), own.get(name, ABSENT))
        for name in names
        if first.get(name, ABSENT) != own.get(name, ABSENT)
    }


def explain(found: Sequence[Difference], world_size: int) -> str:
    """What differs on which ranks."""
    by_name: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    first: dict[str, str] = {}
    for rank, differences in found:
        for name, (theirs, own) in differences.items():
            first[name] = json.dumps(theirs)
            by_name[name][json.dumps(own)].append(rank)
    differ = "differs" if len(found) == 1 else "differ"
    lines = [f"{len(found):,} of {world_size:,} ranks {differ} from rank 0 in settings or version:"]
    for name, values in list(by_name.items())[:MOST_LINES]:
        others = "; ".join(f"{_shown(value)} on {ranks_named(ranks)}" for value, ranks in values.items())
        lines.append(f"  {name}: {_shown(first[name])} on rank 0, {others}")
    if len(by_name) > MOST_LINES:
        lines.append(f"  and {counted(len(by_name) - MOST_LINES, 'other')}")
    lines.append("  start all of them with the same recipe, arguments and installation.")
    return "\n".join(lines)


def _shown(value: str) -> str:
    return "unset" if value == "null" else value
