"""Reads hostile indexes in a process of its own, whose memory is limited; prints what each cost as JSON."""

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megagap.checkpoint import Index
from megagap.errors import CheckpointError

CHECKSUM = "0" * 16
HEADER = 8
LIMIT = 2**30


def index_of(tensors: str, size: int, files: int = 1) -> str:
    listed = [
        dict(name=f"rank_{i:05}.safetensors", size=size, header_size=HEADER, header_checksum=CHECKSUM)
        for i in range(files)
    ]
    return f'{{"format":1,"files":{json.dumps(listed)},"tensors":[{tensors}],"state":{{}}}}'


def tensor(chunks: Iterator[tuple[list[int], list[int]]], shape: list[int], name: str = "w") -> str:
    """One whose chunks lie end to end in the file."""
    listed, position = [], HEADER
    for offsets, sizes in chunks:
        length = 4
        for size in sizes:
            length *= size
        listed.append(
            f'{{"offsets":{offsets},"sizes":{sizes},"file":"rank_00000.safetensors","begin":{position},'
            f'"end":{position + length},"checksum":"{CHECKSUM}"}}'.replace(" ", "")
        )
        position += length
    return f'{{"kind":"weight","name":"{name}","shape":{shape},"dtype":"F32","chunks":[{",".join(listed)}]}}'


def cases(many: int) -> Iterator[tuple[str, str, int]]:
    """Name, body of the index, and the size of the file, which is sparse. ``many``: chunks of indexes that are read."""
    million = 10**6
    chunk = f'{{"offsets":[0],"sizes":[1],"file":"rank_00000.safetensors","begin":8,"end":12,"checksum":"{CHECKSUM}"}}'
    listed = ",".join([chunk] * million)
    whole = f'{{"kind":"weight","name":"w","shape":[{million}],"dtype":"F32","chunks":[{listed}]}}'
    yield "a million chunks", index_of(whole, HEADER + 4 * million), HEADER + 4 * million
    yield "a million chunks, of a file of nothing but holes", index_of(whole, 2**40), 2**40
    del listed, whole
    size = HEADER + 4 * many
    side = round(many ** (1 / 6))
    cube = ((list(place), [1] * 6) for place in itertools.product(range(side), repeat=6))
    yield (
        "chunks side by side in six dimensions",
        index_of(tensor(cube, [side] * 6), HEADER + 4 * side**6),
        HEADER + 4 * side**6,
    )
    same = (([0], [1]) for _ in range(many))
    yield "every chunk the same", index_of(tensor(same, [many]), size), size
    empty = ",".join(tensor(iter(()), [0], f"t{i}") for i in range(many))
    yield "tensors without elements, in a file with some", index_of(empty, size), size
    bad = f'{{"offsets":[-1],"sizes":[],"file":1,"begin":{"9" * 4000},"end":null,"checksum":""}}'
    chunks = ",".join([bad] * 5000)
    faults = f'{{"kind":"weight","name":"w","shape":[1],"dtype":"F32","chunks":[{chunks}]}}'
    yield "faults everywhere", index_of(faults, 64), 64
    yield "a huge shape", index_of(tensor(iter([([0] * 8, [1] * 8)]), [2**60] * 8), HEADER + 4), HEADER + 4
    one = tensor(iter([([0], [1])]), [1])
    good = index_of(one, HEADER + 4)
    for name, state in {
        "deep JSON": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "deep lists": '{"a":' + "[" * 1_000_000 + "]" * 1_000_000 + "}",
        "a huge integer": '{"a":' + "9" * 1_000_000 + "}",
        "NaN": '{"a":NaN}',
        "infinity": '{"a":-Infinity}',
        "a key twice": '{"a":1,"a":2}',
    }.items():
        yield name, good.replace('"state":{}', f'"state":{state}'), HEADER + 4
    yield "a key twice in a chunk", good.replace('"begin":8,', '"begin":8,"begin":8,'), HEADER + 4
    yield "a path out of the folder", good.replace("rank_00000", "../rank_00000"), HEADER + 4


def main(folder: Path, many: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
    for name, body, size in cases(many):
        with open(folder / "rank_00000.safetensors", "wb") as file:
            file.truncate(size)
        text = body + "}\n"
        (folder / "index.json").write_text(f'{{"checksum":"{xxhash.xxh3_64_hexdigest(text.encode())}","body":{text}')
        del body, text
        start = time.process_time()
        answer: Any = None
        try:
            Index.read(folder)
        except CheckpointError as error:
            answer = str(error)
        print(json.dumps([name, time.process_time() - start, answer and answer[:300]]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
