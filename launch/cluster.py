"""The Ray cluster of a run: our own packages on every worker, whatever folder the user starts from.

Ray puts the driver's script folder and current folder in front of every worker's module path. Our packages have names
as plain as `data` and `trainer`, so a user's folder with a `data/` of its own would win. Giving Ray a working
directory that is ours (`launch/worker_directory`, empty but for a note) switches that off; a hook in every worker
process then compares the digest of the packages it imports with the driver's.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import RequestError, RunError
from data.faults import FAULT_VARIABLE
from launch.node_check import check_nodes
from launch.provenance import ROOT, package_digest
from launch.user_path import PACKAGES, append_user_path
from trainer.run_settings import LOCAL, ClusterSettings

DIGEST_VARIABLE = "WINDLASS_PACKAGE_DIGEST"
UNCHECKED = "unchecked"
"""Value of the variable that switches the check off, for those who edit the packages while a run is on."""
USER_PATH_VARIABLE = "WINDLASS_USER_PATH"
"""The driver's folder, which workers put last on their module path."""
WORKING_DIRECTORY = Path(__file__).parent / "worker_directory"
HOOK = "launch.cluster.check_packages"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the driver of a submitted job: the job's runtime environment."""
CONNECT_S = 10.0
"""Seconds within which a cluster's address must take a connection."""
STARTS = 3
TOOK_TOO_LONG = "timed out during startup"
"""Ray's words for processes of its own that were not up in time."""
FEWEST_LOGICAL_CPUS = 8
"""Logical CPUs are a count of actors that may live at once, not of cores; ours fit into 8."""
TOKEN_WANTED = (
    "a cluster started with RAY_AUTH_MODE=token, or cluster.unauthenticated true where something else keeps strangers "
    "from its ports"
)
_HELD: list[bool] = []
"""Not empty while `cluster` holds a cluster in this process."""
PASSED_ON = (FAULT_VARIABLE, "WINDLASS_REWARD_TOKEN", "DS_ACCELERATOR", "HF_HUB_OFFLINE")
"""Variables of the driver that every worker gets, also on a cluster that was started elsewhere."""


def check_packages() -> None:
    """Runs in every worker process before its first task: are these the driver's packages?

    Puts the user's folder last on the module path as well, so that a ranker of their own can be imported.

    Raises:
        RunError: they differ; one line says where they lie.
    """
    user_path = os.environ.get(USER_PATH_VARIABLE)
    if user_path:
        append_user_path(user_path)
    expected = os.environ.get(DIGEST_VARIABLE)
    if expected in (None, UNCHECKED):
        return
    assert expected is not None
    found = package_digest()
    if found != expected:
        raise RunError(
            f"the windlass packages in {ROOT} on {os.uname().nodename} have the digest {found[:12]}, the driver's have "
            f"{expected[:12]}: install the same version on every node"
        )


def shipped_with_job() -> bool:
    """Whether our packages came as the working directory of the Ray job that this process drives."""
    return JOB_VARIABLE in os.environ and Path.cwd().resolve() == ROOT


def runtime_environment(extra: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What Ray gives every worker of a run."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    digest = UNCHECKED if os.environ.get(DIGEST_VARIABLE) == UNCHECKED else package_digest()
    variables |= {DIGEST_VARIABLE: digest, USER_PATH_VARIABLE: os.getcwd(), **(extra or {})}
    # Packages that came with the job are on the nodes in the job's own working directory only.
    folder = {} if shipped_with_job() else {"working_dir": str(WORKING_DIRECTORY)}
    return {**folder, "worker_process_setup_hook": HOOK, "env_vars": variables}


@contextmanager
def cluster(
    settings: ClusterSettings,
    *,
    environment: Mapping[str, str] | None = None,
    quiet: bool = True,
    folders: Sequence[Path] = (),
) -> Iterator[None]:
    """Start Ray on this machine, or connect to a running cluster, and leave it at the end.

    Within another call of it, this one takes part in that one's cluster: sessions that follow each other (a replay)
    start Ray once.

    A cluster is joined where `cluster.address` or RAY_ADDRESS (which submitted jobs have) names one, and not `local`;
    then every node is checked before anything is started. `environment` is added to every worker's. A cluster started
    here keeps Ray's default for token authentication (RAY_AUTH_MODE); the token is made on the way, the user need not
    do anything.

    Args:
        settings: the section `cluster`.
        environment: variables of every worker.
        quiet: keep what workers print to their log files.
        folders: folders that every node must share with this one.

    Raises:
        RequestError: there is no cluster at `cluster.address`, it takes calls without a token, or a node does not see
            a folder.
        RunError: a worker's packages, or a node's libraries, are not the driver's.
    """
    import logging

    import ray

    if ray.is_initialized():
        if not _HELD:
            raise RuntimeError("Ray is already running in this process")
        yield
        return
    # The hook's module must be importable on workers, which have our installation but not our path.
    _refuse_shadowed_packages()
    arguments: dict[str, Any] = {
        "runtime_env": runtime_environment(environment),
        "namespace": "windlass",
        "log_to_driver": not quiet,
        "logging_level": logging.ERROR if quiet else logging.INFO,
    }
    address = settings.address_or_local
    if address == LOCAL:
        check_shared_memory(settings.object_store_mib)
        arguments |= {
            "address": LOCAL,
            "num_cpus": settings.num_cpus or max(FEWEST_LOGICAL_CPUS, os.cpu_count() or 1),
            "object_store_memory": settings.object_store_mib * 2**20,
            "include_dashboard": False,
        }
    else:
        check_address(address)
        arguments["address"] = address
        # What a submitted job was given and what a run gives its workers are joined; where both speak, the run does.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        start_ray(arguments)
    except (ConnectionError, ValueError) as error:
        raise RequestError("cluster.address", address, f"the address of a running Ray cluster ({error})") from error
    # Ray takes SIGTERM over and ends the process at once; a run ends at its next step boundary.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        token = _try_a_worker()
        if address != LOCAL:
            if not token and not settings.unauthenticated:
                raise RequestError("cluster.address", f"{address}, which takes calls without a token", TOKEN_WANTED)
            check_nodes(folders)
        _HELD.append(True)
        with full_store_named(settings):
            yield
    finally:
        _HELD.clear()
        ray.shutdown()
        forget_serve()


def forget_serve() -> None:
    """Make Ray Serve look for its controller again: by the job's number, which the next cluster of this machine gets
    too, it would take the controller of this one for its own."""
    context = sys.modules.get("ray.serve.context")
    if context is not None:
        context._disconnect()


def start_ray(arguments: Mapping[str, Any]) -> None:
    """`ray.init`, once more where a busy machine took longer than the 30 s that Ray gives its own processes."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(**arguments)
            return
        except Exception as error:
            # Ray raises nothing more precise.
            if not left or TOOK_TOO_LONG not in str(error):
                raise
            ray.shutdown()


def check_shared_memory(mib: int, folder: Path = Path("/dev/shm")) -> None:
    """Refuse an object store that shared memory has no room for; Ray would put it on the disk, many times slower.

    Raises:
        RequestError: names what is free.
    """
    free = shutil.disk_usage(folder).free // 2**20 if folder.is_dir() else 0
    if free < mib:
        raise RequestError("cluster.object_store_mib", mib, f"at most {free}, the MiB that are free in {folder}")


@contextmanager
def full_store_named(settings: ClusterSettings) -> Iterator[None]:
    """A full object store as one line that says what to raise.

    Raises:
        RunError: in place of Ray's own error.
    """
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        size = "of the cluster" if settings.joins else f"of {settings.object_store_mib} MiB (cluster.object_store_mib)"
        reason = str(error).splitlines()[0]
        raise RunError(f"Ray's object store {size} is full: {reason}; what was finished before stays") from error


def check_address(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes.

    Raises:
        RequestError: neither `auto` nor HOST:PORT, or no connection within seconds.
    """
    if address == "auto":
        return
    legal = "`auto`, or HOST:PORT (or ray://HOST:PORT) of a running Ray cluster"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise RequestError("cluster.address", repr(address), legal)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RequestError("cluster.address", f"{address} ({error})", legal) from error


def asks_for_tokens() -> bool:
    """Runs in a worker: whether the cluster that it belongs to takes calls with a token alone."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def _try_a_worker() -> bool:
    """Let one worker run the hook, so that wrong packages are one clear line before any actor is started.

    Returns:
        Whether the cluster asks for tokens.
    """
    import ray

    probe = ray.remote(num_cpus=0, max_retries=0)(asks_for_tokens)
    try:
        return bool(ray.get(probe.remote()))
    except ray.exceptions.WorkerCrashedError as error:
        raise RunError(
            f"a Ray worker refused to start: its windlass packages have not the driver's digest "
            f"({package_digest()[:12]}). Install the same version on every node; do not edit them while a run "
            f"is on, or set {DIGEST_VARIABLE}={UNCHECKED}"
        ) from error


def _refuse_shadowed_packages() -> None:
    """Refuse to start when this very process imported somebody else's package by one of our names."""
    for name in PACKAGES:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).resolve().parent != ROOT / name:
            raise RequestError(
                f"package {name}", f"imported from {file}", f"{ROOT / name}; start windlass, not python, in this folder"
            )
