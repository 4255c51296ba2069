"""The worked examples of CONTRIBUTING.md and docs/extending.md: apply one to a checkout, or record it from there.

examples:
  python -m tests.worked_examples apply parameter --part tests      # its tests alone, which then fail
  python -m tests.worked_examples apply parameter --part package    # the change, and they pass
  python -m tests.worked_examples undo parameter                    # the checkout as it was
  python -m tests.worked_examples record parameter                  # write the checkout's changes into the page
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "docs/extending.md")
PARTS = ("tests", "package")
CONTEXT = 1
"""Unchanged lines around each change: few, so that changes nearby do not stop an example from applying."""

_BLOCK = re.compile(
    r"<!-- example: (?P<name>[a-z]+), (?P<part>tests|package) -->\n```diff\n(?P<text>.*?)```\n", re.DOTALL
)
_COMMAND = re.compile(r"<!-- example: (?P<name>[a-z]+), run -->\n```bash\n(?P<text>.*?)```\n", re.DOTALL)
_FILE = re.compile(r"^\+\+\+ b/(.+)$", re.MULTILINE)


class ExampleError(Exception):
    """What cannot be applied or recorded, and what to do."""


@dataclass(frozen=True)
class Example:
    """One worked example as its page has it."""

    name: str
    page: str
    tests: str
    """A unified diff that adds the tests."""
    package: str
    """A unified diff of everything else."""
    command: str
    """What runs the tests, one or more shell commands."""

    def diff(self, part: str) -> str:
        """``tests``, ``package``, or ``all`` of it."""
        return {"tests": self.tests, "package": self.package, "all": self.tests + self.package}[part]

    def files(self, part: str) -> list[str]:
        """Paths that a part changes or adds, relative to the checkout."""
        return list(dict.fromkeys(_FILE.findall(self.diff(part))))


def read_examples(root: Path = ROOT) -> dict[str, Example]:
    """All examples by name, in the order of the pages."""
    found: dict[str, Example] = {}
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        commands = {match["name"]: match["text"] for match in _COMMAND.finditer(text)}
        for name, command in commands.items():
            parts = {part: "".join(_blocks(text, name, part)) for part in PARTS}
            found[name] = Example(name, page, **parts, command=command)
    return found


def _blocks(page: str, name: str, part: str) -> list[str]:
    return [match["text"] for match in _BLOCK.finditer(page) if (match["name"], match["part"]) == (name, part)]


def apply(example: Example, part: str, root: Path, *options: str) -> None:
    """Change the checkout at ``root``, all of it or nothing. ``options`` go to ``git apply``.

    Raises :class:`ExampleError` where the code around a change is no longer what the page says.
    """
    done = subprocess.run(
        ["git", "apply", *options, "-"], cwd=root, input=example.diff(part), capture_output=True, text=True
    )
    if not done.returncode:
        return
    where = f"{example.page}: {part} of example {example.name}"
    if _would_apply(example, part, root, reverse="--reverse" not in options):
        raise ExampleError(f"{where} is {'not applied' if '--reverse' in options else 'applied already'}")
    if "--reverse" in options:
        files = " ".join(_FILE.findall(example.diff(part)))
        raise ExampleError(
            f"{where} cannot be undone, since a file was changed besides:\n{done.stderr}"
            f"  undo your own change first, or restore what git knows of: git checkout {files}"
        )
    raise ExampleError(
        f"{where} cannot be applied:\n{done.stderr}"
        "  apply what fits with --reject, edit the rest by hand (*.rej has it), then record the example."
    )


def _would_apply(example: Example, part: str, root: Path, reverse: bool) -> bool:
    command = ["git", "apply", "--check", *(["--reverse"] if reverse else []), "-"]
    return subprocess.run(command, cwd=root, input=example.diff(part), capture_output=True, text=True).returncode == 0


def record(example: Example, root: Path) -> None:
    """Write the changes in the checkout at ``root`` into the example's diffs; each block keeps its files.

    Raises :class:`ExampleError` if a file of the example has no changes.
    """
    page = root / example.page

    def renewed(match: re.Match[str]) -> str:
        if match["name"] != example.name:
            return match[0]
        diffs = "".join(_changes(root, path) for path in _FILE.findall(match["text"]))
        return match[0].replace(match["text"], diffs)

    page.write_text(_BLOCK.sub(renewed, page.read_text(encoding="utf-8")), encoding="utf-8")


def _changes(root: Path, path: str) -> str:
    known = subprocess.run(["git", "ls-files", "--error-unmatch", path], cwd=root, capture_output=True)
    before = ["HEAD", "--", path] if known.returncode == 0 else ["--no-index", "/dev/null", path]
    diff = ["git", "diff", "--no-color", "--no-ext-diff", f"-U{CONTEXT}", *before]
    text = subprocess.run(diff, cwd=root, capture_output=True, text=True).stdout
    if not text:
        raise ExampleError(f"{path} has no changes: apply the example first")
    # Which commit a diff was made from, and in which function, is of no use to a reader.
    return re.sub(r"^(@@ .*? @@).*$", r"\1", text[text.index("--- ") :], flags=re.MULTILINE)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.worked_examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    examples = read_examples()
    parser.add_argument("action", choices=("apply", "undo", "record"))
    parser.add_argument("example", choices=tuple(examples))
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="which of its diffs (all)")
    parser.add_argument("--reject", action="store_true", help="apply what fits, leave the rest in *.rej files")
    options = parser.parse_args(arguments)
    example = examples[options.example]
    try:
        if options.action == "record":
            record(example, ROOT)
        else:
            more = ["--reverse"] if options.action == "undo" else []
            apply(example, options.part, ROOT, *more, *(["--reject"] if options.reject else []))
    except ExampleError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    if options.action == "apply":
        print(f"applied; run:\n{example.command}", end="")


if __name__ == "__main__":
    main()
