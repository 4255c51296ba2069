"""``tests.warm_start`` starts programs as Python does, but for the time that it takes."""

import os
import signal
import subprocess
import sys

import pytest

from tests.launching import is_alive, wait_until
from tests.warm_start import ENVIRONMENT, python

PROGRAM = """
import json, os, sys
print(json.dumps([sys.argv, sys.path, __name__, os.getcwd(), os.environ["GIVEN"], os.umask(0), sys.stdin.read()]))
print("torch" in sys.modules, bool(sys.modules.keys() & {"megagap", "huggingface_hub"}), file=sys.stderr)
sys.exit(7)
"""


WAYS = {"script": ["program.py", "a b", ""], "module": ["-m", "program", "x"], "text": ["-c", PROGRAM, "-x"]}


@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS.keys())
def test_a_program_sees_what_it_would_see_without_but_torch_is_imported(arguments, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = ENVIRONMENT | {"GIVEN": "caf\udce9", "PYTHONPATH": str(tmp_path / "more")}
    options = dict(cwd=tmp_path, env=environment, umask=0o27, input="in", text=True)
    warm, cold = (
        subprocess.run([start, *arguments], capture_output=True, **options) for start in (python(), sys.executable)
    )
    assert cold.stderr == "False False\n" and warm.stderr == "True False\n"
    assert (warm.stdout, warm.returncode) == (cold.stdout, cold.returncode) and warm.returncode == 7


def test_no_library_that_tests_import_changes_the_environment_so_that_all_would_start_without(tmp_path):
    """As lm-eval does."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"GIVEN": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python(), "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == "True False\n"


ENDING = """
import atexit, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
print("last line")
"""


@pytest.mark.parametrize("end", ["", "sys.exit()", "sys.exit(300)", "sys.exit('why')", "raise KeyError"])
def test_a_program_ends_as_it_would_without(end, tmp_path):
    (tmp_path / "program.py").write_text(ENDING + end)
    warm, cold = (
        subprocess.run([start, "program.py"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        for start in (python(), sys.executable)
    )
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout) and "a thread\nat exit" in cold.stdout
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


@pytest.mark.parametrize("environment", [{"OMP_NUM_THREADS": "3"}, {"PYTHONUTF8": "1"}], ids=str)
def test_what_libraries_read_as_they_are_imported_makes_a_program_start_without(environment, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = ENVIRONMENT | {"GIVEN": ""} | environment
    done = subprocess.run([python(), "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == "False False\n" and done.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("receiver", ["starter", "program"])
def test_a_program_and_its_starter_end_together(number, receiver, tmp_path):
    program = "import os, time\nopen('pid', 'w').write(f'{os.getpid()}\\n')\ntime.sleep(900)"
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen([python(), "program.py"], cwd=tmp_path)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    pid = int((tmp_path / "pid").read_text())
    os.kill(process.pid if receiver == "starter" else pid, number)
    assert process.wait() == -number
    wait_until(lambda: not is_alive(pid))
