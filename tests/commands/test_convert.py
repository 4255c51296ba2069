"""Sizes as options give them."""

import argparse

import pytest

from megagap.commands.convert import byte_size


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), ("77", 77)])
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        byte_size(text)
