"""A real Slurm of one node for the tests, and what stands in for Slurm's commands where there is none."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import until


def fake_command(folder: Path, name: str, body: str) -> Path:
    """Put a command of bash into a folder. What it is called with is listed in the file that is returned."""
    folder.mkdir(exist_ok=True)
    called = folder / f"{name}.called"
    called.touch()
    script = folder / name
    script.write_text(f'#!/bin/bash\necho "$*" >> {called}\n{body}\n')
    script.chmod(0o755)
    return called


class Cluster:
    """A controller, a node and its credentials, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().partition(".")[0]
        controller, node = free_ports(2)
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir()
        # munged refuses a socket that others cannot reach.
        (folder / "munge").chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.conf = folder / "slurm.conf"
        # cred_expire is also how long a requeued task waits. Four tasks shall run at once on any machine.
        self.conf.write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
ReturnToService=2
KillWait=10
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
        self.environment = os.environ | {"SLURM_CONF": str(self.conf)}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        munge = self.folder / "munge"
        paths = [
            f"--{n}={munge / f}" for n, f in (("key-file", "key"), ("socket", "socket"), ("log-file", "log"))
        ]
        paths += [f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"]
        with (
            self._daemon("munged", "--foreground", "--force", *paths),
            self._daemon("slurmctld", "-D"),
            self._daemon("slurmd", "-D"),
        ):
            try:
                until(lambda: self.say("sinfo", "-h", "-o", "%T", check=False) == "idle", seconds=60)
                yield
            finally:
                self.say("scancel", "--user=root", check=False)
                with contextlib.suppress(AssertionError):
                    until(lambda: not self.say("squeue", "-h", check=False), seconds=30)

    @contextlib.contextmanager
    def _daemon(self, *command: str) -> Iterator[None]:
        with (
            (self.folder / f"{command[0]}.out").open("wb") as output,
            subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                yield
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()

    def say(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job; it forgets after some minutes."""
        return dict(re.findall(r"(\w+)=(\S*)", self.say("scontrol", "show", "job", "-o", job)))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A Slurm in a new folder, for root; skips the test where there is none."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start Slurm's daemons; they come with: apt-get install slurm-wlm munge")
    folder.mkdir()
    made = Cluster(folder)
    with pytest.MonkeyPatch.context() as patch, made.running():
        patch.setenv("SLURM_CONF", str(made.conf))
        yield made
