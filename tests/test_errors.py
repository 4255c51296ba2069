"""What libraries raise on a user's input becomes one of our errors; bugs and interruptions stay what they are."""

import pytest

from megagap.errors import CheckpointError, ConfigError, DataError, library_errors


class Panic(BaseException):
    """As pyo3's PanicException."""


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("bad piece"), "bad piece"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (Panic("index out of range"), "index out of range"),
        (KeyError(), "KeyError"),
    ],
)
def test_whatever_a_library_raises_is_told_with_what_it_was_about(raised, told):
    with (
        pytest.raises(CheckpointError, match=rf"^checkpoint error: cannot read x: {told}$"),
        library_errors("cannot read x", CheckpointError),
    ):
        raise raised


@pytest.mark.parametrize("raised", [ConfigError("ours"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_our_errors_and_interruptions_pass(raised):
    with pytest.raises(type(raised)) as caught, library_errors("cannot read x", DataError):
        raise raised
    assert caught.value is raised
