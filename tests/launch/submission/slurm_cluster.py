"""A Slurm of one node on this machine, in a folder of its own: munge, controller and node daemon, from Debian's
packages (slurm-wlm, munge). Needs root, which the daemons run as."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


def lacking() -> str:
    """Why this machine cannot run it; empty when it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=path()) is None]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "needs root, for the Slurm daemons"


def path() -> str:
    """PATH with the folders of daemons."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def slurm(folder: Path, *, cpus: int) -> Iterator[dict[str, str]]:
    """Start the daemons; gives the environment variables with which Slurm's commands reach them."""
    run = folder / "slurm"
    for name in ("state", "spool", "munge"):
        (run / name).mkdir(parents=True)
    # munged refuses folders that others may write, all the way up.
    munge_socket = Path(f"/run/windlass-munge-{os.getpid()}")
    munge_socket.mkdir(mode=0o755)
    key = run / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    controller, daemon = free_ports(2)
    host = socket.gethostname()
    config = run / "slurm.conf"
    config.write_text(
        "\n".join(
            [
                "ClusterName=windlass",
                f"SlurmctldHost={host}(127.0.0.1)",
                "AuthType=auth/munge",
                f"AuthInfo=socket={munge_socket}/socket",
                "SlurmUser=root",
                f"SlurmctldPort={controller}",
                f"SlurmdPort={daemon}",
                f"StateSaveLocation={run}/state",
                f"SlurmdSpoolDir={run}/spool",
                f"SlurmctldPidFile={run}/slurmctld.pid",
                f"SlurmdPidFile={run}/slurmd.pid",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_Core",
                "ReturnToService=2",
                # The node may be told more CPUs than the machine has.
                "SlurmdParameters=config_overrides",
                "MpiDefault=none",
                "KillWait=10",
                f"NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN",
                f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP",
                "",
            ]
        )
    )
    variables = {"SLURM_CONF": str(config), "PATH": path()}
    environment = {**os.environ, **variables}
    log = (run / "daemons.log").open("w")
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        start(
            *("munged", "--foreground", f"--socket={munge_socket}/socket", f"--key-file={key}", "--force"),
            *(f"--pid-file={munge_socket}/pid", f"--seed-file={run}/munge/seed", f"--log-file={run}/munge/log"),
        )
        _await(lambda: (munge_socket / "socket").exists(), "munged")
        start("slurmctld", "-D", "-f", str(config))
        start("slurmd", "-D", "-f", str(config))
        _await(lambda: "idle" in _told(["sinfo", "-h", "-o", "%t"], environment), "an idle node")
        yield variables
    finally:
        for process in reversed(daemons):
            process.terminate()
        for process in daemons:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        log.close()
        shutil.rmtree(munge_socket, ignore_errors=True)


def _told(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30).stdout


def _await(ready: object, what: str, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    assert callable(ready)
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not there after {seconds:.0f} s")
        time.sleep(0.3)
