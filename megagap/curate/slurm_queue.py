"""The jobs of a curation that was given to Slurm: two that write the same files must not run at a time."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megagap.errors import ConfigError, library_errors
from megagap.files import read_regular, write_text

JOBS = "slurm_jobs.json"
"""In the output folder: the numbers of the jobs that were submitted last."""


def record_jobs(output: Path, numbers: Sequence[str]) -> None:
    """Write down what :func:`require_ended` asks for."""
    write_text(output / JOBS, json.dumps(numbers) + "\n")


def require_ended(output: Path) -> None:
    """Raises :class:`ConfigError` while a job of the last submission is in the queue, or where nobody can say."""
    try:
        content = read_regular(output / JOBS)
    except FileNotFoundError:
        return
    with library_errors(f"{output / JOBS} is damaged", ConfigError):
        submitted = [str(number) for number in json.loads(content)]
    told = f"the jobs {', '.join(submitted)} of this curation were submitted to Slurm"
    remove = f"once they have ended, remove {output / JOBS}."
    if shutil.which("squeue") is None:
        raise ConfigError(f"{told}, and there is no squeue here to ask for them\n  {remove}")
    done = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{told}, and squeue does not say whether they have ended: {done.stderr.strip()}\n  {remove}")
    queued = set(done.stdout.split())
    if left := [number for number in submitted if number in queued]:
        raise ConfigError(
            f"{told}; {', '.join(left)} {'is' if len(left) == 1 else 'are'} still in its queue\n"
            f"  wait for the end, or scancel {' '.join(left)}."
        )
