"""Reports which of megagap's packages this Python lacks: fails for required ones, warns about those of an extra.

Runs before anything is installed, so it uses the standard library alone.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version


def missing(requirements: list[str]) -> list[str]:
    """The requirements of which no version is installed. Versions are not compared: a cluster may patch its own."""
    return [requirement for requirement in requirements if not _is_installed(requirement)]


def _is_installed(requirement: str) -> bool:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    try:
        version(name[0])
    except PackageNotFoundError:
        return name[0] == "megagap"  # an extra that names another one
    return True


def main(pyproject: str) -> int:
    with open(pyproject, "rb") as file:
        settings = tomllib.load(file)
    project = settings["project"]
    needed = missing([*project["dependencies"], *settings["build-system"]["requires"]])
    if needed:
        print(
            f"{sys.executable} lacks packages that megagap needs: {', '.join(needed)}\n"
            f"  install them, for example: {sys.executable} -m pip install " + " ".join(f'"{name}"' for name in needed),
            file=sys.stderr,
        )
        return 2
    for extra, requirements in project["optional-dependencies"].items():
        if absent := missing(requirements):
            print(f"warning: without {', '.join(absent)}, megagap[{extra}] is incomplete", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
