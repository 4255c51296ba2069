"""Print one of the example recipes, to be saved and changed."""

import re
from pathlib import Path

from megagap.commands.parser import make_parser
from megagap.errors import ConfigError
from megagap.terminal.programs import CHECKOUT, CalledAs

EXAMPLES = """
examples:
  megagap recipe
      the names of the recipes, and what they are for
  megagap recipe code > code.toml
  megagap recipe quickstart > quickstart.toml

Paths of data in a recipe are relative to the folder that it is saved in.
"""

FOLDERS = (Path(__file__).parents[1] / "recipes", CHECKOUT / "examples/recipes")
"""Where the recipes are: beside the package's modules in a wheel, which copies them there, else in the checkout."""

TO_ROOT = "../../"
"""From ``examples/recipes`` to the checkout, below which their data is."""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("recipe", called_as, __doc__, EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the recipe to print (default: list them)")
    given = parser.parse_args(arguments)
    print(listing() if given.name is None else text_of(given.name), end="")


def recipes() -> dict[str, Path]:
    """The files of the recipes by name. Raises :class:`ConfigError` where they were not installed."""
    for folder in FOLDERS:
        if found := {_name(path, folder): path for path in sorted(folder.rglob("*.toml"))}:
            return found
    raise ConfigError(f"this installation of megagap has no recipes (no {FOLDERS[0]}): install it again")


def _name(path: Path, folder: Path) -> str:
    """``gaperon/1b-young`` of a recipe in a folder of its own."""
    return path.relative_to(folder).with_suffix("").as_posix()


def listing() -> str:
    """A line per recipe: its name, and what its first comment says of it."""
    paths = recipes()
    width = max(map(len, paths))
    lines = [f"{name:<{width}}  {_purpose(path)}" for name, path in paths.items()]
    return "\n".join(lines) + "\n"


def text_of(name: str) -> str:
    """A recipe whose data is below the folder that it is saved in. Raises :class:`ConfigError` if there is none."""
    paths = recipes()
    if name not in paths:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(paths)}")
    text = paths[name].read_text(encoding="utf-8")
    return text.replace("../" * name.count("/") + TO_ROOT, "")


def _purpose(path: Path) -> str:
    comment = path.read_text(encoding="utf-8").partition("\n\n")[0].replace("\n# ", " ").removeprefix("# ")
    return re.split(r"[:.](?:\s|$)", comment)[0]
