"""Tokens per second that one process reads: ``python tests/benchmarks/loader.py [--documents N] [--mask]``.

Sequences of 4,096 from two sources of short documents, warm from the page cache, in steps of 64 samples.
"""

import argparse
import tempfile
import time
from statistics import median

import numpy as np

from megagap.data.indexed import IndexedDatasetWriter
from megagap.data.loader import MicrobatchLoader
from megagap.data.samples import TrainingData
from megagap.timeline import Phase, Source, Timeline

LENGTH, STEP = 4096, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000, help="documents per source, 500 tokens on average")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mask", action="store_true", help="with a document mask")
    given = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for name in ("fr", "en"):
            with IndexedDatasetWriter(f"{folder}/{name}", "int32") as writer:
                for length in random.integers(1, 1000, given.documents):
                    writer.add_document(random.integers(0, 128_256, length, dtype=np.int32))
            sources.append(Source(name, (f"{folder}/{name}",), 0.5))
        timeline = Timeline([Phase("all", None, LENGTH, tuple(sources))], [(0, STEP)])
        data = TrainingData(timeline, seed=1, vocab_size=128_256)
        for workers in (0, 1, 2):
            with MicrobatchLoader(data, 4, workers=workers, document_mask=given.mask) as loader:
                loader.step(1)
                seconds = []
                for step in range(2, given.steps + 2):
                    begin = time.perf_counter()
                    loader.step(step)
                    seconds.append(time.perf_counter() - begin)
            mean = sum(seconds) / len(seconds)
            print(
                f"{workers} workers: {STEP * LENGTH / mean / 1e6:6.1f} M tokens/s "
                f"(a step: mean {mean * 1e3:.2f} ms, median {median(seconds) * 1e3:.2f} ms)"
            )


if __name__ == "__main__":
    main()
