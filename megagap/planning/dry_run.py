"""``python -m megagap.train RECIPE --dry-run``: print the certificate of a layout. Nothing is written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagap.benchmark.step import missing_data
from megagap.checkpoint import find_model
from megagap.config import Settings, load_recipe
from megagap.errors import ConfigError, MegagapError
from megagap.planning.certificate import LayoutError, certify, show
from megagap.planning.devices import Device, load_device
from megagap.planning.memory import memory_by_stage
from megagap.planning.nearest import Change, nearest_layouts
from megagap.terminal.console import Console

DEVICE = "h100"
"""Whose memory is told where the user names no device; only one that was named must be large enough."""


def dry_run(recipe: Path, overrides: Sequence[str], world_size: int, device_name: str | None, as_json: bool) -> None:
    """Print the certificate. Raises :class:`LayoutError` with every reason and the nearest valid layouts if it does
    not hold; with ``as_json``, the object printed has both as well."""
    device = load_device(device_name or DEVICE)

    def has_room(other: Settings) -> bool:
        return device_name is None or _fits(other, device, world_size)

    try:
        settings = load_recipe(recipe, overrides, world_size, needs_data=False, find_model=find_model)
    except MegagapError as error:
        nearest = nearest_layouts(recipe, overrides, world_size, has_room)
        reasons = error.args[0].splitlines()
        if as_json:
            lines = [" ".join(line.split()) for line in (reasons[1:] or reasons)]
            print(json.dumps({"holds": False, "reasons": lines, "nearest": [change.settings for change in nearest]}))
        raise LayoutError(_with_nearest(error.args[0], nearest)) from None
    certificate = certify(settings, device, world_size, device_must_fit=device_name is not None)
    if (missing := missing_data(settings)) is not None:
        certificate.notes.append(f"{missing}: a dry run needs no data, training does")
    certificate.notes.extend(settings.notes)
    nearest = []
    if not certificate.holds:
        nearest = nearest_layouts(recipe, overrides, world_size, has_room)
    if as_json:
        print(json.dumps(certificate.as_dict() | {"nearest": [change.settings for change in nearest]}))
    else:
        show(certificate, Console())
    if not certificate.holds:
        reasons = [f"{recipe} is not proven on {world_size} processes:", *(f"  {x}" for x in certificate.reasons)]
        raise LayoutError(_with_nearest("\n".join(reasons), nearest))


def world_size_of(environment: Mapping[str, str]) -> int:
    """WORLD_SIZE, or 1. Raises :class:`ConfigError` if it is not a number of processes."""
    given = environment.get("WORLD_SIZE", "1").strip()
    if not (given.isascii() and given.isdecimal() and 0 < len(given) < 8 and int(given)):
        raise ConfigError(f"WORLD_SIZE={given} in the environment: must be a number of processes; or give --world-size")
    return int(given)


def _fits(settings: Settings, device: Device, world_size: int) -> bool:
    try:
        return all(stage.fits(device) is not False for stage in memory_by_stage(settings, device, world_size))
    except MegagapError:
        return True


def _with_nearest(reasons: str, nearest: Sequence[Change]) -> str:
    if not nearest:
        return reasons
    return "\n".join([reasons, "nearest valid layouts:", *(f"  {change}" for change in nearest)])
