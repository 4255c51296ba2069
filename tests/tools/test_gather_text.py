"""Gathering text, without a network: the machine's packages are played by a fake apt-get."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from megagap.gather import markup
from tests.launching import SECONDS
from tests.warm_start import python

TOOLS = Path(__file__).parents[2] / "tools"


def gather(*arguments: object, path: str = "/nowhere") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), str(TOOLS / "gather_text.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"PATH": path},
    )


def documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def fake_apt(tmp_path: Path) -> Path:
    """A folder with an apt-get that knows manpages-fr alone, counting its calls, and a dpkg-deb that unpacks it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    page = tmp_path / "page.gz"
    page.write_bytes(
        gzip.compress((".TH LS 1\n.SH NOM\nls \\- afficher\n.PP\n" + "Un texte assez long. " * 20).encode())
    )
    programs = {
        "apt-get": f'echo "$@" >> {tmp_path}/calls\nfor last; do :; done\n'
        'if [ "$last" = manpages-fr ]; then : > manpages-fr_1_all.deb; else echo "E: no $last" >&2; exit 100; fi',
        "dpkg-deb": f'mkdir -p "$3/usr/share/man/fr/man1"\ncp {page} "$3/usr/share/man/fr/man1/ls.1.gz"\n'
        f'cp {page} "$3/usr/share/man/fr/man1/copy.1.gz"',
    }
    for name, program in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)
    return folder


def test_packages_that_cannot_be_had_are_named_and_the_rest_is_used(tmp_path, fake_apt):
    done = gather("--output", tmp_path / "out", "--languages", "fr", path=f"{fake_apt}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert "lilypond-doc-html-fr: skipped: apt-get: E: no lilypond-doc-html-fr" in done.stderr
    (document,) = documents(tmp_path / "out" / "fr.jsonl")  # the copy is left out
    assert document["text"].startswith("LS(1)\n\nNOM\n\nls - afficher")
    assert document["source"].startswith("manpages-fr/usr/share/man/fr/man1/")


def test_a_second_run_does_not_download_again(tmp_path, fake_apt):
    for _ in range(2):
        gather("--output", tmp_path / "out", "--languages", "fr", path=f"{fake_apt}:/usr/bin:/bin")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("download manpages-fr" in call and not call.endswith("-dev") for call in calls) == 1


def test_without_apt_english_comes_from_python_and_french_is_left_out(tmp_path):
    done = gather("--output", tmp_path, "--languages", "en,fr,code", "--megabytes", 0.3)
    assert done.returncode == 0, done.stderr
    assert "no apt-get" in done.stderr and "fr: skipped: no text was found" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["code.jsonl", "en.jsonl"]
    for name in ("en", "code"):
        found = documents(tmp_path / f"{name}.jsonl")
        size = sum(len(document["text"].encode()) for document in found)
        assert 0 < size <= 300_000
        assert all(len(document["text"]) >= 200 for document in found)
        assert len({document["text"] for document in found}) == len(found)


def test_order_of_documents_is_always_the_same_and_not_that_of_folders(tmp_path):
    for name in ("one", "two"):
        gather("--output", tmp_path / name, "--languages", "code", "--megabytes", 0.3)
    one, two = (documents(tmp_path / name / "code.jsonl") for name in ("one", "two"))
    assert one == two
    assert [document["source"] for document in one] != sorted(document["source"] for document in one)


def test_no_text_at_all_is_an_error_with_a_way_out(tmp_path):
    done = gather("--output", tmp_path, "--languages", "fr")
    assert done.returncode == 2
    assert "data error: no text was found" in done.stderr and "Traceback" not in done.stderr


def test_unknown_language_names_the_possible_ones(tmp_path):
    done = gather("--output", tmp_path, "--languages", "de")
    assert done.returncode == 2 and "possible: en, fr, code" in done.stderr


def test_html_gives_paragraphs_without_navigation_and_scripts():
    page = """<html><head><title>t</title><script>var x;</script></head><body>
      <div class="navheader"><div>next</div> page</div>
      <h1>Title<a class="headerlink" href="#">¶</a></h1><p>One &amp; <b>two</b>
      lines.<p>Unclosed<ul class="x"><li>item</li></ul>
      <pre>  a\n    b\n</pre><table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>
      <nav><p>menu</p></nav><br/>end</body></html>"""
    assert markup.html_to_text(page) == "Title\n\nOne & two lines.\n\nUnclosed\n\n- item\n\n  a\n    b\n\n1 2\n3\n\nend"


def test_roff_gives_the_text_that_man_shows():
    source = "\n".join(
        [
            '.\\" a comment',
            ".TH PRINTF 3",
            ".SH NAME",
            "printf \\- formatted \\fIoutput\\fP",
            ".SH DESCRIPTION",
            "The",
            ".BR printf ()",
            "family",
            '.IR "two words" .',
            ".PP",
            "Next \\(lqparagraph\\(rq \\e \\[u00E9].",
            ".nf",
            "  int  x;",
            ".fi",
            ".IP \\(bu 2",
            "point",
            ".TS",
            "tab(:);",
            "l l.",
            "a:T{",
            "long",
            "cell",
            "T}",
            ".TE",
            ".if n \\{\\",
            "hidden",
            ".\\}",
        ]
    )
    assert markup.roff_to_text(source) == (
        "PRINTF(3)\n\nNAME\n\nprintf - formatted output\n\nDESCRIPTION\n\nThe printf() family two words.\n\n"
        "Next “paragraph” \\ é.\n\n  int  x;\n\n• point\n\na long cell"
    )


def test_pages_that_only_point_to_another_are_empty():
    assert markup.roff_to_text(".so man3/printf.3\n") == ""


@pytest.mark.parametrize("value", ["-1", "0", "nan", "much"])
def test_megabytes_are_a_number_above_0(tmp_path, value):
    done = gather("--output", tmp_path / "out", "--languages", "code", f"--megabytes={value}")
    assert done.returncode == 2 and "--megabytes" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = gather("--output", tmp_path / "file" / "out", "--languages", "code")
    assert done.returncode == 2 and f"cannot create the folder {tmp_path}/file/out" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_page_that_cannot_be_read_is_left_out(tmp_path, fake_apt):
    (tmp_path / "page.gz").write_bytes(b"no gzip")
    done = gather(
        "--output", tmp_path / "out", "--languages", "fr,code", "--megabytes", 0.01, path=f"{fake_apt}:/usr/bin:/bin"
    )
    assert done.returncode == 0, done.stderr
    assert "ls.1.gz: skipped" in done.stderr and (tmp_path / "out" / "code.jsonl").exists()
