"""A Ray head with a dashboard on this machine, apart from every other Ray that may run here."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launch.submission.slurm_cluster import free_ports


@contextmanager
def ray_head(*, cpus: int = 8, **variables: str) -> Iterator[dict[str, str]]:
    """Start it with a token of its own; gives its users' environment, with its addresses as DASHBOARD and GCS."""
    # A short path: Ray's socket names have to fit into 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="wr-", dir="/tmp"))
    gcs, dashboard, agent, client = free_ports(4)
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # A busy machine takes longer than the 30 s after which Ray would take the head down again.
    patience = {"RAY_raylet_start_wait_time_s": "120"}
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}"),
        *("--object-store-memory=200000000", f"--temp-dir={folder}"),
    ]
    with (folder / "head.log").open("w") as log:
        environment = {**os.environ, **access, **patience, **variables}
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _await(f"http://127.0.0.1:{dashboard}/api/version", access["RAY_AUTH_TOKEN"], head, folder / "head.log")
        yield {**access, "DASHBOARD": f"http://127.0.0.1:{dashboard}", "GCS": f"127.0.0.1:{gcs}"}
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _await(url: str, token: str, head: subprocess.Popen[bytes], log: Path, *, seconds: float = 150) -> None:
    """Return when the head says that it has started and its dashboard answers, which may come first."""
    deadline = time.monotonic() + seconds
    while not ("Ray runtime started" in log.read_text() and _answers(url, token)):
        if time.monotonic() > deadline or head.poll() is not None:
            raise RuntimeError(f"no Ray head at {url}: {log.read_text()[-500:]}")
        time.sleep(0.5)


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except OSError:
        # Not yet.
        return False
    return True
