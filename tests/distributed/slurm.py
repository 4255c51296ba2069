"""A real Slurm on this machine: a controller and two nodes, each in a network namespace, in a folder of its own."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.machines import ROOT, Machine, Machines
from tests.launching import SECONDS, descendants

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")

CONFIGURATION = """
ClusterName=megagap
SlurmctldHost={host}({first})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=60
KillWait=30
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr={first} Port={port_of_n1} CPUs=64 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr={second} Port={port_of_n2} CPUs=64 Gres=gpu:8
NodeName=n3 NodeHostname={host} NodeAddr={second} Port={port_of_n3} CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""Nodes that pretend to have what ``train.sbatch`` asks for. Their names resolve to nothing. ``n3`` takes the place of
``n2``, once that is killed: to ``n2`` itself Slurm would repeat, a minute later, what it could not tell it, the end of
the job's first start."""


def missing() -> list[str]:
    """What this machine lacks for it."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


class DoesNotStartError(Exception):
    """Slurm's daemons do not come up: a container may forbid what they need."""


@dataclass
class Slurm:
    """A cluster of nodes ``n1`` and ``n2``, on the two machines; ``n3`` is another one on the second."""

    folder: Path
    machines: Machines
    daemons: dict[str, subprocess.Popen[bytes]]

    def __call__(self, *command: str, **environment: str) -> str:
        """Run a command of Slurm's on the first node; its output."""
        done = subprocess.run(
            [*self.enter("n1"), *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")} | environment,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.log)
        return done.stdout

    @property
    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("slurm*.log")))

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by name."""
        words = self("scontrol", "--oneline", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def enter(self, node: str) -> tuple[str, str]:
        """Not by ``ip netns exec``, which mounts a /sys of its own, where slurmd misses /sys/fs/cgroup."""
        return "nsenter", f"--net=/run/netns/{self._machine_of(node).enter[-1]}"

    def start_node(self, name: str) -> None:
        self.daemons[name] = self._start(*self.enter(name), "slurmd", "-D", "-N", name, name=name)

    def kill_node(self, name: str) -> None:
        """SIGKILL for a node's slurmd and all that runs there, as when the machine loses power."""
        command = ["ip", "netns", "pids", self._machine_of(name).enter[-1]]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        for pid in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.daemons.pop(name).wait()

    def _machine_of(self, node: str) -> Machine:
        return self.machines.machines[0 if node == "n1" else 1]

    def _start(self, *command: str, name: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"slurm_{name}.log", "wb") as output:
            environment = os.environ | {
                "SLURM_CONF": str(self.folder / "slurm.conf"),
                "PATH": f"{os.environ['PATH']}:/usr/sbin",
            }
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def count_idle(self) -> int:
        """How many nodes answer and have nothing to do."""
        try:
            return self("sinfo", "--noheader", "--Node", "--states=idle", "--format=%T").split().count("idle")
        except AssertionError:  # the controller does not answer yet
            return 0

    def wait(self, condition, seconds: float) -> None:
        """Wait for a condition; fail with the logs when ``seconds`` are over."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {seconds} s\n{self.log}"
            time.sleep(0.3)


@contextmanager
def slurm(machines: Machines) -> Iterator[Slurm]:
    """A cluster on two namespaces, whose daemons and folder are gone afterwards."""
    first, second = machines.machines
    with tempfile.TemporaryDirectory(prefix="megagap-slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        for part in ("state", "spool.n1", "spool.n2", "spool.n3"):
            (folder / part).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        text = CONFIGURATION.format(
            host=os.uname().nodename.split(".")[0],
            first=first.address,
            second=second.address,
            folder=folder,
            port=16817,
            port_of_n1=16818,
            port_of_n2=16819,
            port_of_n3=16820,
        )
        (folder / "slurm.conf").write_text(text)
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        cluster = Slurm(folder, machines, {})
        try:
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
            options = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
            cluster.daemons["munged"] = cluster._start("munged", "--foreground", "--force", *options, name="munged")
            try:
                cluster.wait((folder / "munge.socket").exists, SECONDS)
                cluster.daemons["slurmctld"] = cluster._start(*cluster.enter("n1"), "slurmctld", "-D", name="slurmctld")
                cluster.start_node("n1")
                cluster.start_node("n2")
                cluster.wait(lambda: cluster.daemons["slurmctld"].poll() is None and cluster.count_idle() == 2, SECONDS)
            except AssertionError as error:
                raise DoesNotStartError(str(error)) from None
            yield cluster
        finally:
            for daemon in cluster.daemons.values():
                for pid in [*descendants(daemon.pid), daemon.pid]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                daemon.wait()
