"""How fast text becomes token files, compared with the bare tokenizer, datatrove, and Megatron's script.

    python tests/benchmarks/preprocess.py                        # everything: a quarter of an hour on two cores
    python tests/benchmarks/preprocess.py --megabytes 10 --rounds 1 --skip datatrove,memory

Text: what tools/gather_text.py gathers, and the Python sources of the installed packages, as JSON lines. Tokenizer:
Llama 3's, from the package llama-models. Contestants take turns; each runs in a process of its own, timed from start
to end, including start-up, except bare tokenizers: for these, texts are in memory, and only the encoding counts.
Start-up is the time for three documents.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from string import ascii_lowercase
from typing import Any

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "fr", "code")
BARE = ("tiktoken, 1 thread", "tiktoken, 2 threads", "gigatoken, 1 thread", "gigatoken, 2 threads")
PREPROCESS = ("megagap, --fast off", "megagap, --fast on")
CONTESTANTS = (*PREPROCESS, "Megatron's way", "datatrove", *BARE)
GIGABYTE = 10**9


# Contestants: each runs in a process of its own and is given the corpus, a folder to write to, and the number of cores.


def texts_of(corpus: Path) -> list[str]:
    with open(corpus, "rb") as file:
        return [json.loads(line)["text"] for line in file]


def bare(name: str, corpus: Path, folder: Path, cores: int) -> float:
    """Seconds for encoding alone."""
    texts = texts_of(corpus)
    threads = int(name.split(", ")[1].split()[0])
    encode: Callable[[], Any]
    if name.startswith("tiktoken"):
        from megagap.tokenizer import load_tokenizer

        encoding = load_tokenizer(rank_file())._backend  # type: ignore[attr-defined]
        encode = lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)  # noqa: E731
    else:
        import gigatoken

        os.environ["RAYON_NUM_THREADS"] = str(threads)
        tokenizer = gigatoken.Tokenizer(str(folder / "tokenizer.json"))
        encode = lambda: tokenizer.encode_batch(texts, parallel=threads > 1)  # noqa: E731
    started = time.perf_counter()
    encode()
    return time.perf_counter() - started


def megagap(name: str, corpus: Path, folder: Path, cores: int) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from preprocess_data import main

    files = ["--input", str(corpus), "--output-prefix", str(folder / "megagap"), "--tokenizer", str(rank_file())]
    main([*files, "--append-eod", "--workers", str(cores), *name.split(", ")[1].split()])


def megatrons_way(name: str, corpus: Path, folder: Path, cores: int) -> None:
    """tools/preprocess_data.py of Megatron-LM: a pool, lines in chunks of 32, a document at a time, lists of ids."""
    from multiprocessing import Pool

    from megagap.data.indexed import IndexedDatasetWriter

    with (
        Pool(cores, start_encoding, (str(folder / "tokenizer.json"),)) as pool,
        open(corpus, encoding="utf-8") as file,
        IndexedDatasetWriter(folder / "megatron", "int32") as writer,
    ):
        for ids in pool.imap(encode_line, file, 32):
            writer.add_document(ids)


def start_encoding(tokenizer: str) -> None:
    global hugging_face
    from tokenizers import Tokenizer

    hugging_face = Tokenizer.from_file(tokenizer)


def encode_line(line: str) -> list[int]:
    ids: list[int] = hugging_face.encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, 128_001]


def datatrove(name: str, corpus: Path, folder: Path, cores: int) -> None:
    """One task per core, each with a part of the corpus, as it distributes whole files."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    with open(corpus, "rb") as file:
        lines = file.readlines()
    for i in range(cores):
        (parts / f"{i}.jsonl").write_bytes(b"".join(lines[i::cores]))
    writer = MegatronDocumentTokenizer(
        str(folder / "datatrove"), tokenizer_name_or_path=str(folder / "tokenizer.json"), eos_token="<|end_of_text|>",
        batch_size=1000,
    )  # fmt: skip
    pipeline = [JsonlReader(str(parts)), writer]
    log = folder / f"log-{time.time_ns()}"
    LocalPipelineExecutor(pipeline, tasks=cores, workers=cores, logging_dir=str(log)).run()


FUNCTIONS: dict[str, Callable[[str, Path, Path, int], float | None]] = {
    **dict.fromkeys(BARE, bare),
    **dict.fromkeys(PREPROCESS, megagap),
    "Megatron's way": megatrons_way,
    "datatrove": datatrove,
}


def rank_file() -> Path:
    from llama_models.llama3 import tokenizer

    return Path(tokenizer.__file__).with_name("tokenizer.model")


# The benchmark itself.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/benchmark-preprocess", metavar="DIR")
    parser.add_argument("--megabytes", type=int, default=160, metavar="N", help="megabytes of text (default: 160)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds; medians count (default: 3)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument(
        "--skip", default="", metavar="NAME,…", help=f"leave out any of {', '.join(CONTESTANTS)}, memory"
    )
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    corpus = given.corpus or given.output / f"corpus-{given.megabytes}.jsonl"
    if given.contestant:
        seconds = FUNCTIONS[given.contestant](given.contestant, corpus, given.output, given.cores)
        if seconds is not None:
            print(json.dumps({"seconds": seconds}))
        return
    skipped = [name.strip() for name in given.skip.split(",")]
    names = [name for name in CONTESTANTS if not any(skip and name.startswith(skip) for skip in skipped)]
    given.output.mkdir(parents=True, exist_ok=True)
    if not corpus.exists():
        gather(corpus, given.megabytes * 10**6)
    few = given.output / "few.jsonl"
    with open(corpus, "rb") as file:
        few.write_bytes(b"".join(islice(file, 3)))
    write_hugging_face(given.output / "tokenizer.json")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, __file__, "--output", str(given.output), "--megabytes", str(given.megabytes)]
    command += ["--cores", str(given.cores)]
    start_up = {
        name: time_of([*command, "--contestant", name, "--corpus", str(few)], environment) for name in PREPROCESS
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(given.rounds):
        for name in names:
            seconds[name].append(time_of([*command, "--contestant", name], environment))
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    result: dict[str, Any] = {
        "bytes": corpus.stat().st_size,
        "cores": given.cores,
        "seconds": seconds,
        "start_up": start_up,
    }
    if (manifest := given.output / "megagap_text_document.json").exists():
        result["tokens"] = json.loads(manifest.read_text())["tokens"]
    if "memory" not in skipped:
        result["peak_memory_bytes"] = {
            size: peak_memory(given.output, corpus, size, given.cores, environment) for size in (10**7, GIGABYTE)
        }
    (given.output / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
    report(result)


def gather(corpus: Path, size: int) -> None:
    """Write ``size`` bytes of JSON lines: a document of each language in turn, then Python sources if needed."""
    folder = corpus.parent / "text"
    gather_text = [sys.executable, str(ROOT / "tools/gather_text.py"), "--output", str(folder)]
    subprocess.run(gather_text, check=True, stdout=sys.stderr)
    partial = corpus.with_suffix(".partial")
    with open(partial, "wb") as file:
        for line in chain(in_turn([folder / f"{language}.jsonl" for language in LANGUAGES]), sources()):
            file.write(line)
            if file.tell() >= size:
                break
        else:
            raise SystemExit(f"only {file.tell() / 1e6:.0f} MB of text found; give --megabytes")
    partial.rename(corpus)


def in_turn(paths: list[Path]) -> Iterator[bytes]:
    files = [path.read_bytes().splitlines(keepends=True) for path in paths]
    for documents in zip_longest(*files, fillvalue=b""):
        yield from documents


def sources() -> Iterator[bytes]:
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text:
            yield json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", errors="ignore") + b"\n"


def write_hugging_face(path: Path) -> None:
    """Llama 3's rank file in Hugging Face's format, for those that read nothing else."""
    from megagap.tokenizer.tiktoken import to_hugging_face

    to_hugging_face(rank_file()).save(str(path))


def time_of(command: list[str], environment: dict[str, str]) -> float:
    """Seconds that a contestant reports, else those that it took."""
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    said = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    return float(json.loads(said[-1])["seconds"]) if said else seconds


def peak_memory(folder: Path, corpus: Path, size: int, cores: int, environment: dict[str, str]) -> int:
    """Peak memory of all processes of a run; on up to ``size`` bytes of ``corpus``, never the same twice."""
    path = folder / "memory.jsonl"
    with open(path, "wb") as file:
        for text in new_texts(corpus):
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            if file.tell() >= size:
                break
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path), "--workers", str(cores)]
    command += ["--output-prefix", str(folder / "memory"), "--tokenizer", str(rank_file()), "--fast", "auto"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(memory_of, [process.pid, *children_of(process.pid)])))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    path.unlink()
    return peak


def new_texts(corpus: Path) -> Iterator[str]:
    """The texts of ``corpus``, then again with each letter shifted, so that words are new to a tokenizer's cache."""
    for shift in count():
        shifted = str.maketrans(ascii_lowercase, ascii_lowercase[shift % 26 :] + ascii_lowercase[: shift % 26])
        for text in texts_of(corpus):
            yield text.translate(shifted)


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def memory_of(pid: int) -> int:
    """Its private bytes: pages shared with other processes, and of files, count in part or not at all."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def report(result: dict[str, Any]) -> None:
    medians = {name: statistics.median(times) for name, times in result["seconds"].items()}
    megabytes, tokens = result["bytes"] / 1e6, result.get("tokens", 0) / 1e6
    slow = medians.get("Megatron's way")
    print(f"{megabytes:.1f} MB of JSON lines, {tokens:.1f} M tokens, {result['cores']} cores; medians")
    for name, seconds in medians.items():
        times = f"{slow / seconds:5.1f} × Megatron's way" if slow else ""
        print(f"{name:22} {seconds:7.2f} s {megabytes / seconds:7.1f} MB/s {tokens / seconds:6.2f} M tokens/s {times}")
    best = min((seconds for name, seconds in medians.items() if name.startswith("tiktoken")), default=None)
    if best and (ours := medians.get("megagap, --fast off")):
        print(f"megagap, --fast off has {best / ours:.0%} of the speed of bare tiktoken at its best")
    for name, seconds in result["start_up"].items():
        if name in medians and medians[name] > seconds:
            print(f"{name}: {seconds:.2f} s of start-up; without, {megabytes / (medians[name] - seconds):.1f} MB/s")
    for size, peak in result.get("peak_memory_bytes", {}).items():
        print(f"peak memory of all processes at {int(size) / 1e6:,.0f} MB of input: {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
