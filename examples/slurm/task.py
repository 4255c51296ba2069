"""What srun starts on each node: examples/multi_node/launch.sh with the arguments given here, and signals forwarded.

Slurm signals the tasks that it started, not their children. SIGTERM is for torchrun, which passes it on; SIGUSR1 would
end torchrun, and is for its workers. (Not in bash, whose ``wait`` may lose the exit status of what ends as a signal
comes.)
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "multi_node/launch.sh"
AWAITED = {signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD}


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    torchrun = subprocess.Popen([LAUNCH, *sys.argv[1:]], preexec_fn=take_signals)  # launch.sh becomes torchrun
    notice = False  # which the workers have not got yet; Slurm sends it once
    while torchrun.poll() is None:
        received = signal.sigtimedwait(AWAITED, 1)
        number = received.si_signo if received else None
        if number == signal.SIGTERM:
            torchrun.terminate()
        notice = notice or number == signal.SIGUSR1
        if notice:
            workers = children_that_take_notices(torchrun.pid)
            for worker in workers:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGUSR1)
            notice = not workers
    code = torchrun.returncode
    sys.exit(code if code >= 0 else 128 - code)


def take_signals() -> None:
    """For torchrun; SIGUSR1 is ignored, in case that it reaches it all the same. The workers hold and handle it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)


def children_that_take_notices(parent: int) -> list[int]:
    """Those that hold or handle SIGUSR1. Workers do soon after they start; before, they would ignore it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended since
            lines = (folder / "status").read_text(errors="replace").splitlines()
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            mask = int(fields["SigBlk"], 16) | int(fields["SigCgt"], 16)
            if int(fields["PPid"]) == parent and mask >> (signal.SIGUSR1 - 1) & 1:
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    main()
