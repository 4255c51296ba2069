"""Plants what a curation should find into a corpus, and measures what it found.

    python examples/curation/plant.py plant CORPUS PLANTED BENCHMARKS [SEED]
    python examples/curation/plant.py measure OUTPUT

``plant`` writes the folder PLANTED: the files of CORPUS, and planted-*.jsonl: near-duplicates of documents (a few words
changed), and documents taken out of the other files, with items of a made-up benchmark put into them, with personal
data and what only looks like it, or under URLs, half of them blocked. BENCHMARKS gets the benchmark. ``measure`` prints
recall and precision of each, as JSON, from what ``megagap curate run`` left in OUTPUT.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagap.curate.contamination import Ngrams
from megagap.curate.counts import documents
from megagap.errors import DataError, run_tool

PLANTED = 60
"""Documents of each kind."""

SUBJECTS = ("the lantern keeper", "a retired surveyor", "the violin maker", "an apprentice glazier", "the ferry pilot")
VERBS = ("measures", "repairs", "catalogues", "paints", "counts", "polishes")
OBJECTS = ("seventeen brass hinges", "a chart of the estuary", "forty cedar planks", "the bell tower clock")
PLACES = ("before the spring tide", "behind the old granary", "along the northern canal", "under the slate roof")


def benchmark_item(chance: random.Random, number: int) -> dict[str, str]:
    def sentence() -> str:
        return f"{chance.choice(SUBJECTS)} {chance.choice(VERBS)} {chance.choice(OBJECTS)} {chance.choice(PLACES)}"

    return {"question": f"In story {number}, {sentence()} while {sentence()}. What happens next?", "answer": sentence()}


def iban(chance: random.Random) -> str:
    account = "".join(chance.choices("0123456789", k=23))
    check = 98 - int(account + "152700") % 97
    text = f"FR{check:02}{account}"
    return " ".join(text[i : i + 4] for i in range(0, len(text), 4))


def card(chance: random.Random) -> str:
    digits = [4, *(chance.randrange(10) for _ in range(14))]
    total = sum(d if i % 2 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits))
    text = "".join(map(str, [*digits, -total % 10]))
    return " ".join(text[i : i + 4] for i in range(0, 16, 4))


def personal_data(chance: random.Random) -> dict[str, str]:
    name = "".join(chance.choices("abcdefghij", k=8))
    digits = "".join(chance.choices("0123456789", k=8))
    return {
        "email": f"{name}@{chance.choice(('laposte.net', 'orange.fr', 'mail.org'))}",
        "phone": f"0{chance.choice('12346')} {' '.join(digits[i : i + 2] for i in range(0, 8, 2))}",
        "ip": f"{chance.randrange(60, 90)}.{chance.randrange(256)}.{chance.randrange(256)}.{chance.randrange(1, 255)}",
        "iban": iban(chance),
        "card": card(chance),
    }


def lookalikes(chance: random.Random) -> list[str]:
    """None of these is personal data: a private address, a version, a failed checksum, an example's address."""
    wrong = card(chance)
    return [
        f"192.168.{chance.randrange(256)}.{chance.randrange(256)}",
        f"version {chance.randrange(9)}.{chance.randrange(99)}.{chance.randrange(99)}.{chance.randrange(99)}.1",
        wrong[:-1] + str((int(wrong[-1]) + 1) % 10),
        f"user{chance.randrange(1000)}@example.com",
    ]


def changed(text: str, chance: random.Random) -> str:
    """With one in a hundred words replaced by another of the text: 5-grams stay alike to about 0.9."""
    words = text.split(" ")
    for at in range(len(words)):
        if chance.random() < 0.01:
            words[at] = chance.choice(words)
    return " ".join(words)


def plant(corpus: Path, output: Path, benchmarks: Path, seed: int) -> None:
    chance = random.Random(seed)
    files = {path.name: [json.loads(line) for line in path.open(encoding="utf-8")] for path in corpus.glob("*.jsonl")}
    usable = [
        (name, i)
        for name in sorted(files)
        if name[:3] in ("en-", "fr-")
        for i, document in enumerate(files[name])
        if 1500 < len(document["text"]) < 20000
    ]
    if len(usable) < 8 * PLANTED:
        raise DataError(f"{corpus} has too few documents\n  gather text first: examples/curation/gather.py")
    chosen = iter(chance.sample(usable, 4 * PLANTED))

    def taken() -> str:
        """The text of a document, which is then only where it is planted."""
        name, i = next(chosen)
        text = str(files[name][i]["text"])
        files[name][i] = None
        return text

    planted: dict[str, list[dict[str, Any]]] = {"copies": [], "benchmark": [], "personal": [], "urls": []}
    items = [benchmark_item(chance, number) for number in range(PLANTED)]
    for i, item in enumerate(items):
        name, place = next(chosen)
        original = files[name][place]
        planted["copies"].append({"text": changed(original["text"], chance), "planted": original["source"]})
        planted["benchmark"].append({"text": insert(taken(), " ".join(item.values()), chance), "planted": str(i)})
        text, data, other = taken(), personal_data(chance), lookalikes(chance)
        for value in [*data.values(), *other]:
            text = insert(text, f"({value})", chance)
        planted["personal"].append({"text": text, "planted": data, "lookalikes": other})
        url = "https://blocked.example.net/page" if i % 2 else "https://docs.example.org/page"
        planted["urls"].append({"text": taken(), "url": url})
    write(benchmarks / "stories.jsonl", items)
    for name, documents_left in files.items():
        write(output / name, [document for document in documents_left if document is not None])
    for name, lines in planted.items():
        write(output / f"planted-{name}.jsonl", lines)


def insert(text: str, part: str, chance: random.Random) -> str:
    """Between two sentences, or at the end."""
    places = [match.end() for match in re.finditer(r"[.;:]\s", text)] or [len(text)]
    at = chance.choice(places)
    return f"{text[:at]} {part} {text[at:]}"


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- measure


def measure(output: Path) -> dict[str, Any]:
    return {
        "near-duplicates": duplicates(output),
        "benchmark n-grams": benchmark(output),
        "personal data": masked(output),
    }


def reached(output: Path, stage: str, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Planted documents that came as far as ``stage``: those that it dropped, and the others."""
    later = {"deduplicate": ("decontaminate", "classifier"), "decontaminate": ("classifier",)}[stage]
    dropped = of(documents(output / "dropped" / stage), name)
    kept = [d for part in later for d in of(documents(output / "dropped" / part), name)]
    return dropped, kept + of(documents(output / "curated"), name)


def of(found: Iterator[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [document for document in found if f"planted-{name}." in document["metadata"]["file_path"]]


def duplicates(output: Path) -> dict[str, Any]:
    """A pair is found if either of the two is dropped. Of what is dropped, precision is the share that is similar
    (Jaccard of 5-grams of words at least 0.5) to a document of its cluster that stays."""
    filtered = list(documents(output / "work/filtered"))
    originals = {document["metadata"].get("source"): document["id"] for document in filtered}
    dropped = list(documents(output / "dropped/deduplicate"))
    gone = {document["id"] for document in dropped}
    pairs = [
        (document["id"], originals[document["metadata"]["planted"]])
        for document in of(iter(filtered), "copies")
        if document["metadata"]["planted"] in originals
    ]
    grams = Ngrams(5)
    clusters: dict[int, list[set[int]]] = {}
    kept = [
        *documents(output / "curated"),
        *(d for s in ("decontaminate", "classifier") for d in documents(output / "dropped" / s)),
    ]
    for document in kept:
        cluster = document["metadata"].get("minhash_cluster_id", -1)
        if cluster >= 0:
            clusters.setdefault(cluster, []).append(set(grams.hashes(document["text"])))
    alike = 0
    for document in dropped:
        mine = set(grams.hashes(document["text"]))
        others = clusters.get(document["metadata"].get("minhash_cluster_id", -1), [])
        alike += any(len(mine & other) >= 0.5 * len(mine | other) for other in others)
    found = sum(bool(gone & set(pair)) for pair in pairs)
    return {
        "planted": len(pairs), "found": found, "recall": share(found, len(pairs)),
        "dropped": len(dropped), "precision": share(alike, len(dropped)),
    }  # fmt: skip


def benchmark(output: Path) -> dict[str, Any]:
    """Precision: the share of what is dropped in which the made-up stories stand, word by word."""
    dropped, kept = reached(output, "decontaminate", "benchmark")
    everything = list(documents(output / "dropped/decontaminate"))
    reached_it = len(dropped) + len(kept)
    right = sum(bool(re.search(r"In story \d+, (?:the|an?) ", document["text"])) for document in everything)
    return {
        "planted": reached_it, "found": len(dropped), "recall": share(len(dropped), reached_it),
        "dropped": len(everything), "precision": share(right, len(everything)),
    }  # fmt: skip


def masked(output: Path) -> dict[str, Any]:
    """By kind: planted values that are gone. Precision: of planted values and lookalikes that are gone, the former."""
    texts = [*of(documents(output / "curated"), "personal"), *of(documents(output / "dropped/classifier"), "personal")]
    result: dict[str, Any] = {"documents": len(texts)}
    gone = total = 0
    for kind in ("email", "phone", "ip", "iban", "card"):
        found = sum(document["metadata"]["planted"][kind] not in document["text"] for document in texts)
        result[kind] = share(found, len(texts))
        gone, total = gone + found, total + len(texts)
    wrong = sum(value not in document["text"] for document in texts for value in document["metadata"]["lookalikes"])
    return result | {
        "planted": total,
        "found": gone,
        "recall": share(gone, total),
        "precision": share(gone, gone + wrong),
    }


def share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def main() -> None:
    match sys.argv[1:]:
        case ["plant", corpus, output, benchmarks, *seed]:
            plant(Path(corpus), Path(output), Path(benchmarks), int(seed[0]) if seed else 0)
        case ["measure", output]:
            print(json.dumps(measure(Path(output)), indent=2))
        case _:
            raise DataError("plant CORPUS PLANTED BENCHMARKS [SEED], or measure OUTPUT")


if __name__ == "__main__":
    run_tool(main)
