"""A Slurm of two nodes on this machine, in one folder, for as long as standard input stays open.

`python slurm_cluster.py FOLDER`, as root, prints "ready" when jobs can be submitted with SLURM_CONF=FOLDER/slurm.conf.
A node's name on its standard input starts the slurmd of that node again. When its standard input closes, however its
parent ended, every process that this cluster started is ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
SlurmdTimeout=10
MinJobAge=3600
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=6000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=6000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""`cred_expire` (s) is also how long a job that was queued again waits: 120 s by default. A node that is silent for
`SlurmdTimeout` (s) is down. Finished jobs can be asked about for `MinJobAge` (s)."""


def configure(folder: Path) -> dict[str, str]:
    """Write slurm.conf and munge's key; the environment of everything that belongs to this cluster."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(NODES))]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, ports=ports, cpus=max(2, os.cpu_count() or 2))
    )
    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    return os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}


def start(name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start a daemon in the foreground of its own session; its messages go to FOLDER/NAME.out."""
    with open(folder / f"{name}.out", "ab") as out:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )


def start_node(name: str, folder: Path, environment: dict[str, str]) -> None:
    """Start a node's slurmd."""
    start(name, ["slurmd", "-D", "-N", name, "-f", f"{folder}/slurm.conf"], folder, environment)


def up(folder: Path, environment: dict[str, str]) -> None:
    """Start munged, slurmctld and one slurmd for each node, and wait until all nodes are idle."""
    munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    options = [f"--{option}={folder}/{file}" for option, file in munge.items()]
    start("munged", ["munged", "--foreground", "--force", *options], folder, environment)
    until(lambda: (folder / "munge.socket").exists(), "munged must open its socket", folder)
    start("slurmctld", ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"], folder, environment)
    for name in NODES:
        start_node(name, folder, environment)
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]

    def idle() -> bool:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stdout.strip() == str(len(NODES))

    until(idle, "both nodes must be idle", folder)


def until(condition: object, what: str, folder: Path, seconds: float = 60.0) -> None:
    """Wait for `condition()`; SystemExit with the end of every log when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            logs = (f"{p.name}: {p.read_text(errors='replace')[-500:]}" for p in sorted(folder.glob("*.[lo][ou][gt]")))
            raise SystemExit(f"{what} within {seconds:.0f} s\n" + "\n".join(logs))
        time.sleep(0.1)


def members(folder: Path, *variables: str) -> list[int]:
    """Processes whose environment names this cluster: daemons, job steps, and what runs in them.

    Only those that have all of `variables` too, each NAME=VALUE, or NAME= with any value.
    """
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (place / "environ").read_bytes().decode(errors="replace").split("\0")
            wanted = [f"SLURM_CONF={folder}/slurm.conf", *variables]
            if all(any(e == w or (w[-1] == "=" and e.startswith(w)) for e in environment) for w in wanted):
                found.append(int(place.name))
    return [pid for pid in found if pid != os.getpid()]


def down(folder: Path) -> None:
    """End every process of the cluster, those of jobs too."""
    while found := members(folder):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    variables = configure(place)
    try:
        up(place, variables)
        print("ready", flush=True)
        for line in sys.stdin:
            start_node(line.strip(), place, variables)
    finally:
        down(place)
