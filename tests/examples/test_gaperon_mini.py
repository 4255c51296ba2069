"""examples/gaperon_mini/run.sh --quick goes from gathered text to one page that any browser shows without a network."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megagap.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/gaperon_mini/run.sh"
SECTIONS = ["curation", "quality", "planted", "mixture", "losses", "models", "activation", "exposure", "time"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a story told from beginning to end."""
    if shutil.which("apt-get") is None:
        pytest.skip("the text comes from Debian packages, and there is no apt-get")
    folder = tmp_path_factory.mktemp("gaperon") / "mini"
    tell(folder)
    return folder


def tell(folder: Path) -> str:
    done = subprocess.run(
        [SCRIPT, "--quick", "--output", folder],
        env=os.environ | {"MEGAGAP_VENV": sys.prefix}, capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.images: dict[str, str] = {}
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "img":
            self.images[given["alt"]] = given["src"]
        self.addresses += [given[name] for name in ("src", "href") if name in given]


def test_the_page_has_every_section_with_its_pictures_inside(story: Path):
    page = Page((story / "report.html").read_text(encoding="utf-8"))
    assert page.sections == SECTIONS
    assert list(page.images) == ["mixture plan", "losses by source and phase", "activation", "exposure of vaults"]
    for title, source in page.images.items():
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        pixels = imread(io.BytesIO(png))
        assert min(pixels.shape[:2]) > 200 and np.ptp(pixels) > 0.5, title
    assert "svg" in page.tags and not {"script", "link", "iframe"} & page.tags
    assert not [address for address in page.addresses if not address.startswith(("data:", "#"))]


def test_a_browser_shows_the_page(story: Path, tmp_path: Path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,8000", f"--screenshot={picture}",
         f"--user-data-dir={tmp_path / 'profile'}", (story / "report.html").as_uri()],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] > 2000 and (pixels.min(axis=(1, 2)) < 0.9).mean() > 0.3  # rows with something on them


def test_losses_fall_on_every_source_and_the_branches_end_lower(story: Path):
    young = [r for r in read_metrics(story / "young/metrics.jsonl") if "validation_loss" in r]
    for source in ("en", "fr", "code"):
        key = f"validation_loss/{source}"
        assert young[-1][key] < young[0][key] - 1, source
    branch = [r for r in read_metrics(story / "cooldown-2/metrics.jsonl") if "validation_loss" in r]
    assert branch[-1]["validation_loss"] < young[-1]["validation_loss"]


def test_the_export_of_the_average_predicts_as_the_average_does(story: Path):
    average, exported = (
        json.loads((story / f"evaluation/{name}.json").read_text())["sources"] for name in ("average", "hf")
    )
    for source, expected in average.items():
        assert exported[source]["loss"] == pytest.approx(expected["loss"], abs=0.01), source


def test_a_second_call_does_nothing_again_and_another_size_is_refused(story: Path):
    assert tell(story).count("done before") == 10
    refused = subprocess.run(
        [SCRIPT, "--output", story], env=os.environ | {"MEGAGAP_VENV": sys.prefix}, capture_output=True, text=True
    )  # fmt: skip
    assert refused.returncode == 2 and "holds another story" in refused.stderr
