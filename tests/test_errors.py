"""What libraries raise on a user's input becomes one of our errors; bugs and interruptions stay what they are."""

import errno
import os
import subprocess
import sys

import pytest

from megagap.errors import CheckpointError, ConfigError, DataError, counted, file_system_error, library_errors


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
        pytest.raises(CheckpointError, match=rf"^checkpoint error: cannot read x: {told}"),
        library_errors("cannot read x", CheckpointError),
    ):
        raise raised


@pytest.mark.parametrize("raised", [ConfigError("ours"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_our_errors_and_interruptions_pass(raised):
    with pytest.raises(type(raised)) as caught, library_errors("cannot read x", DataError):
        raise raised
    assert caught.value is raised


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "cannot use /a/b: No space left on device\n  its disk",
        ),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "cannot use /a and /b: Invalid cross"),
        (OSError(errno.EIO, "Input/output error"), "system error: Input/output error\n"),
        (OSError("odd"), "system error: odd"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"x\xff"), "cannot use x\\xff: No such"),
    ],
)
def test_what_the_system_refuses_names_the_file(error, told):
    assert told in str(file_system_error(error))


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("open('/nowhere-at-all/x')", 2, "system error: cannot use /nowhere-at-all/x: No such file"),
        ("raise ValueError('a bug')", 1, "Traceback"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise BrokenPipeError", 0, ""),
        ("print('\\udcff')", 0, ""),
    ],
)
def test_a_tool_ends_with_the_code_and_the_message_of_what_happened(body, code, told):
    program = f"from megagap.errors import run_tool\ndef main():\n    {body}\nrun_tool(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code and told in done.stderr
    assert ("Traceback" in done.stderr) == (told == "Traceback")


@pytest.mark.parametrize("shown", ["print('x' * 100)", "rich.print('x' * 100)"])
def test_a_reader_that_has_seen_enough_is_no_fault(shown):
    program = f"import rich\nfrom megagap.errors import run_tool\ndef main():\n    for _ in range(10_000): {shown}\n"
    told = subprocess.Popen([sys.executable, "-c", program + "run_tool(main)"], stdout=subprocess.PIPE, stderr=-1)
    assert told.stdout is not None and told.stderr is not None
    told.stdout.read(10)
    told.stdout.close()
    assert (told.wait(), told.stderr.read()) == (0, b"")
    told.stderr.close()


@pytest.mark.parametrize("closed", [[0], [1], [2], [1, 2], [0, 1, 2]])
def test_a_tool_whose_streams_are_closed_does_its_work_and_writes_into_no_file_by_mistake(tmp_path, closed):
    program = (
        "import os, sys; from megagap.errors import run_tool\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'out')!r}, 'wb') as file:\n"
        "        print('to a person'); print('a warning', file=sys.stderr); sys.stdin.read()\n"
        "        os.write(1, b'a library'); os.write(2, b'a library')\n"
        "        file.write(b'content')\n"
        "run_tool(main)"
    )
    closing = " ".join(f"{stream}>&-" for stream in closed)
    command = [*("sh", "-c"), f'exec "$@" {closing}', "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (tmp_path / "out").read_bytes() == b"content"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_behind_standard_output_is_told():
    program = "from megagap.errors import run_tool; run_tool(lambda: print('x' * 100_000))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [(0, ("step",), "0 steps"), (1, ("step",), "1 step"), (2000, ("step",), "2,000 steps"),
     (1, ("process", "processes"), "1 process"), (3, ("process", "processes"), "3 processes")],
)  # fmt: skip
def test_what_is_counted_has_its_plural(number, words, text):
    assert counted(number, *words) == text
