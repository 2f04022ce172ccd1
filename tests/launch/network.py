"""Hosts on one machine: network namespaces with addresses of their own behind one bridge, each of which can be cut off.

They share this machine's files, as hosts of a cluster share a file system, and nothing else but the wire. Needs root
and iproute2. Everything is named by a random word, and taken down at the end with the processes in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PORT = 6379
# A node that falls silent is dead to Ray after seconds, not minutes.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_start_wait_time_s": "120",
}


def lacking() -> str:
    """What this machine lacks for namespaces; empty when it lacks nothing."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2"
    name = f"wt{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"needs network namespaces ({tried.stderr.strip()})"
    _ip("netns", "del", name)
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """A namespace."""

    name: str
    address: str
    wire: str
    """This machine's end of its cable."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Run a command on the host."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env={**os.environ, **variables},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cut_off(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.wire, "down")

    def reconnect(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self.wire, "up")

    def kill_all(self) -> None:
        """End every process on the host, as when it is switched off."""
        # Once more, because one that was not killed yet may have started another.
        for _ in range(3):
            told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
            for pid in told.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait(timeout=30)
        self.processes.clear()


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts on one wire: 10.X.Y.1, 10.X.Y.2, ..."""
    word = secrets.token_hex(2)
    net = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(250)}"
    bridge, made = f"wb{word}", list[Host]()
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            host = Host(f"wn{word}{number}", f"{net}.{number}", f"wv{word}{number}")
            _ip("netns", "add", host.name)
            made.append(host)
            _ip("link", "add", host.wire, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.wire, "master", bridge)
            _ip("link", "set", host.wire, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            host.kill_all()
            _ip("netns", "del", host.name)
        _ip("link", "del", bridge)


@dataclass
class RayHosts:
    """A Ray cluster over hosts; the first one is the head."""

    machines: list[Host]
    folder: Path
    """A short path: Ray's socket names have to fit into 107 bytes."""
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def address(self) -> str:
        """Where drivers connect."""
        return f"{self.machines[0].address}:{PORT}"

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its nodes and users."""
        return {**IMPATIENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, number: int, *, cpus: int, marks: Mapping[str, int]) -> None:
        """Start the Ray node of a host."""
        host = self.machines[number]
        place = (
            ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
            if number == 0
            else [f"--address={self.address}"]
        )
        resources = ", ".join(f'"{name}": {amount}' for name, amount in marks.items())
        # A busy machine may take longer than the 30 s after which a node of Ray gives up.
        again = 'for _ in 1 2 3; do "$@"; done'
        host.start(
            *("bash", "-c", again, "again", str(Path(sys.executable).parent / "ray")),
            *("start", "--block", "--disable-usage-stats", *place, f"--node-ip-address={host.address}"),
            *(f"--num-cpus={cpus}", f"--resources={{{resources}}}", "--object-store-memory=150000000"),
            log=self.folder / f"node-{number}.log",
            **self.variables,
        )

    def told(self) -> str:
        """The last words of every node."""
        return "\n".join(f"{log.name}: {log.read_text()[-600:]}" for log in sorted(self.folder.glob("node-*.log")))


@contextmanager
def ray_hosts(count: int) -> Iterator[RayHosts]:
    """Hosts, with a folder for Ray; nodes are started by the caller."""
    folder = Path("/tmp") / f"wr-{secrets.token_hex(3)}"
    folder.mkdir()
    try:
        with hosts(count) as made:
            yield RayHosts(made, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(met: object, what: str, *, seconds: float, told: object = lambda: "") -> None:
    """Ask again and again.

    Raises:
        AssertionError: not met in time; `told` says more.
    """
    assert callable(met)
    assert callable(told)
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{told()}"
        time.sleep(0.3)
