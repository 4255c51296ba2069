"""Histograms of quality scores by source, as SVG."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BINS = 20


@dataclass
class Histogram:
    source: str
    kept: list[int]
    dropped: list[int]

    @property
    def total(self) -> int:
        return sum(self.kept) + sum(self.dropped)


def source_of(document: dict[str, Any]) -> str:
    """The file that a document was read from, without its folder and endings."""
    path = str(document.get("metadata", {}).get("file_path", ""))
    return Path(path).name.partition(".")[0] or str(document.get("source", "")) or "all"


def histograms(
    kept: Iterable[dict[str, Any]], dropped: Iterable[dict[str, Any]] = (), head: str = "overall"
) -> list[Histogram]:
    """By source, of documents with ``quality_scores`` in their metadata; others are passed over."""
    found: dict[str, Histogram] = {}
    for documents, name in ((kept, "kept"), (dropped, "dropped")):
        for document in documents:
            scores = document.get("metadata", {}).get("quality_scores")
            if scores:
                source = source_of(document)
                histogram = found.setdefault(source, Histogram(source, [0] * BINS, [0] * BINS))
                getattr(histogram, name)[min(BINS - 1, int(scores[head] / 2 * BINS))] += 1
    return [found[source] for source in sorted(found)]


def draw(histogram: Histogram, width: int = 560, height: int = 120) -> str:
    """Bars from 0 to 2, those of dropped documents above those of kept ones."""
    top = max(map(sum, zip(histogram.kept, histogram.dropped, strict=True))) or 1
    step = width / BINS
    bars = []
    for i, (kept, dropped) in enumerate(zip(histogram.kept, histogram.dropped, strict=True)):
        base = float(height)
        for count, colour in ((kept, "#2a7"), (dropped, "#c53")):
            tall = height * count / top
            base -= tall
            if count:
                bars.append(
                    f'<rect x="{i * step + 1:.1f}" y="{base:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" '
                    f'fill="{colour}"><title>{count:,}</title></rect>'
                )
    labels = "".join(
        f'<text x="{x}" y="{height + 14}" font-size="11" text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in ((0, "start", "0 low"), (width / 2, "middle", "1 medium"), (width, "end", "2 high"))
    )
    size = f'width="{width}" height="{height + 18}" viewBox="0 0 {width} {height + 18}"'
    return f'<svg {size} xmlns="http://www.w3.org/2000/svg" role="img">{"".join(bars)}{labels}</svg>'
