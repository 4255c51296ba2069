"""One HTML page of what a curation kept and dropped: no script, no network, pictures inline."""

import html
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megagap.curate.counts import EXAMPLES, Count, count_stages, documents, stage_seconds
from megagap.curate.histogram import Histogram, draw, histograms
from megagap.files import write_text

SHOWN = 600
"""Characters of an example that are shown."""

DESCRIPTIONS = {
    "read": "Lines that are no document: not JSON, not UTF-8, or without a text.",
    "urls": "Domains, addresses and words of block lists (datatrove's URLFilter).",
    "language": "The language of the text, and how sure it is.",
    "repetition": "Repeated lines, paragraphs and n-grams (Rae et al. 2021, table A1).",
    "gopher": "Length, words, symbols, stop words (Rae et al. 2021, section A.1.1).",
    "fineweb": "Lines without an end, short and repeated lines (Penedo et al. 2024).",
    "deduplicate": "Near-duplicates by MinHash; one document of each cluster stays.",
    "mask": "Personal data replaced; no document is dropped.",
    "decontaminate": "Documents that have an n-gram of a benchmark.",
    "classifier": "Documents that the quality classifier calls low.",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em }
table { border-collapse: collapse; width: 100% } td, th { padding: .25em .6em; text-align: right; vertical-align: top }
td:first-child, th:first-child, td.text { text-align: left } tr { border-bottom: 1px solid #eee }
pre { white-space: pre-wrap; background: #f6f6f4; padding: .8em; border-left: 3px solid #bbb; overflow-wrap: anywhere }
pre.kept { border-color: #2a7 } pre.dropped { border-color: #c53 } .note { color: #666 } svg { max-width: 100% }
"""


def write_report(output: Path) -> Path:
    """Of the curation in ``output``, as ``report.html`` there. Raises :class:`DataError`."""
    counts = count_stages(output)
    path = output / "report.html"
    write_text(path, _page(output, counts))
    return path


def _page(output: Path, counts: Sequence[Count]) -> str:
    read, kept = counts[0].total, counts[-1].kept
    scored = histograms(documents(output / "curated"), documents(output / "dropped/classifier"))
    seconds = stage_seconds(output)
    parts = [
        "<h1>Curation</h1>",
        f"<p>{read:,} documents read, {kept:,} kept ({_share(kept, read)}); "
        f"{sum(seconds.values()):,.1f} CPU seconds"
        + (f", {read / sum(seconds.values()):,.0f} documents per CPU second" if sum(seconds.values()) else "")
        + ".</p>",
        _table(counts, read),
        *(_section(output, count) for count in counts),
    ]
    if scored:
        parts += ["<h2>Quality by source</h2>", _legend(), *map(_histogram, scored)]
    parts += ["<h2>Kept to the end</h2>", *_examples(documents(output / "curated"), "kept")]
    return html_page("Curation", parts)


def html_page(title: str, parts: Iterable[str]) -> str:
    """A page of its own from pieces of HTML."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _table(counts: Sequence[Count], read: int) -> str:
    rows = [
        f"<tr><td><a href='#{count.stage}'>{count.stage}</a></td><td>{count.total:,}</td><td>{count.kept:,}</td>"
        f"<td>{count.dropped:,}</td><td>{_share(count.dropped, count.total)}</td>"
        f"<td>{f'{count.per_second:,.0f}' if count.per_second else '–'}</td><td>{_bar(count, read)}</td></tr>"
        for count in counts
    ]
    titles = ("stage", "documents", "kept", "dropped", "", "per second of a task", "")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _bar(count: Count, read: int) -> str:
    """Kept and dropped, of all that were read."""
    width = 260
    kept = width * count.kept / read if read else 0
    dropped = width * count.dropped / read if read else 0
    return (
        f'<svg width="{width}" height="12" role="img"><rect width="{width}" height="12" fill="#eee"/>'
        f'<rect width="{kept:.1f}" height="12" fill="#2a7"/>'
        f'<rect x="{kept:.1f}" width="{dropped:.1f}" height="12" fill="#c53"/></svg>'
    )


def _section(output: Path, count: Count) -> str:
    parts = [f"<h2 id='{count.stage}'>{count.stage}</h2>", f"<p>{DESCRIPTIONS.get(count.stage, '')}</p>"]
    for title, values in (("dropped because", count.reasons), ("counted", count.details)):
        if values:
            listed = sorted(values.items(), key=lambda item: -item[1])
            rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:,}</td></tr>" for name, value in listed)
            parts.append(f"<table style='width:auto'><tr><th>{title}</th><th></th></tr>{rows}</table>")
    parts += _examples(documents(output / "dropped" / count.stage), "dropped")
    return "\n".join(parts)


def _examples(found: Iterable[dict[str, Any]], kind: str) -> list[str]:
    """The first of each reason, or of each language."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for document in islice(found, 5000):
        metadata = document.get("metadata", {})
        group = str(metadata.get("filter_reason" if kind == "dropped" else "language", ""))
        if len(chosen.setdefault(group, [])) < (1 if kind == "dropped" and len(chosen) > EXAMPLES else EXAMPLES):
            chosen[group].append(document)
    parts = []
    for group, examples in chosen.items():
        for document in examples[: EXAMPLES if len(chosen) == 1 else 1 if kind == "dropped" else EXAMPLES]:
            text = document["text"]
            more = f" … ({len(text):,} characters)" if len(text) > SHOWN else ""
            about = " · ".join(part for part in (kind, group, str(document.get("id", "")), _noted(document)) if part)
            parts.append(
                f"<p class='note'>{html.escape(about)}</p><pre class='{kind}'>{html.escape(text[:SHOWN])}{more}</pre>"
            )
    return parts


def _noted(document: dict[str, Any]) -> str:
    metadata = document.get("metadata", {})
    if "contaminated_ngram" in metadata:
        return f"{metadata['contaminated_task']}: “{metadata['contaminated_ngram']}”"
    return f"language {metadata.get('language', '?')} {metadata.get('language_score', '')}"


def _legend() -> str:
    return (
        "<p>Documents that reached the classifier, by their expected overall level, from 0 (low) to 2 (high); "
        "dropped ones are red.</p>"
    )


def _histogram(histogram: Histogram) -> str:
    return f"<h3>{html.escape(histogram.source)} <span class='note'>{histogram.total:,}</span></h3>{draw(histogram)}"


def histogram_page(found: Sequence[Histogram]) -> str:
    """Histograms alone, for ``megagap curate histogram``."""
    return html_page("Quality by source", ["<h1>Quality by source</h1>", _legend(), *map(_histogram, found)])
