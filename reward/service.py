"""The reward service on Ray Serve: bring-up on a free port, the client, shutdown.

One deployment scores and speaks HTTP. A replica whose ranker hangs or whose process dies is replaced by Serve; callers
see a reason and try again.
"""

from __future__ import annotations

import logging
import socket
import uuid
from pathlib import Path
from typing import Any

from data.errors import RequestError, RunError
from reward.bearer import bearer_token, required_token
from reward.client import HandleAttempt, HttpAttempt, RewardClient
from reward.list_ranker import check_list_ranker
from reward.ranker import check_ranker
from reward.replica import ReplicaOptions, RewardReplica
from reward.settings import RewardSettings, Transport
from reward.swap_client import HandleSwapAttempt, HttpSwapAttempt, SwapClient

NAME = "windlass-reward"


def check_service(settings: RewardSettings) -> None:
    """Refuse a service that could not be started, before anything else is: no Ray is needed.

    Raises:
        RequestError: no such ranker, an address without the token.
    """
    if settings.url is not None or not settings.asks_service:
        return
    required_token("reward.host", settings.host, settings.token_env)
    _check_rankers(settings)


class RewardService:
    """A running reward service, started here or elsewhere."""

    def __init__(self, settings: RewardSettings, *, address: str, handle: Any, app_name: str | None) -> None:
        self.settings = settings
        self.address = address
        """Base URL, e.g. http://127.0.0.1:41234."""
        self._handle = handle
        self._app_name = app_name

    @classmethod
    def start(cls, settings: RewardSettings) -> RewardService:
        """Start the application in the connected Ray cluster and wait until it scores.

        With `settings.url` nothing is started: the service there is used. Where Ray Serve already runs an application
        in the cluster, this one gets a path of its own beside it.

        Raises:
            RequestError: no ranker, a ranker that cannot be loaded, an address without the token, a port in use.
            RunError: the application did not come up.
        """
        if settings.url is not None:
            return cls(settings, address=settings.url, handle=None, app_name=None)
        if not settings.asks_service:
            raise RequestError("reward.ranker", "none", "a ranker: the service has nothing to score with")
        token = required_token("reward.host", settings.host, settings.token_env)
        _check_rankers(settings)

        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        host, port = serve_at(settings.host, settings.port, section="reward")
        app_name = f"{NAME}-{uuid.uuid4().hex[:8]}"
        prefix = f"/{app_name}" if serve.status().applications else "/"
        service = cls(settings, address=base_url(host, port, prefix), handle=None, app_name=app_name)
        deployment = _deployment(settings).bind(_options(settings, token))
        try:
            service._handle = serve.run(deployment, name=app_name, route_prefix=prefix, logging_config=quiet())
        except RuntimeError as error:
            why = why_not(app_name) or str(error)
            service.close()
            raise RunError(f"the reward service did not start: {' '.join(why.split())}") from error
        return service

    def client(self) -> RewardClient:
        """A client with the configured transport; a service elsewhere is always called over HTTP."""
        if self._handle is not None and self.settings.transport is Transport.HANDLE:
            return RewardClient(HandleAttempt(self._handle), self.settings)
        return RewardClient(HttpAttempt(self.address, bearer_token(self.settings.token_env)), self.settings)

    def swap_client(self) -> SwapClient:
        """A client for swap credit, with the transport of `client`."""
        if self._handle is not None and self.settings.transport is Transport.HANDLE:
            return SwapClient(HandleSwapAttempt(self._handle), self.settings)
        return SwapClient(HttpSwapAttempt(self.address, bearer_token(self.settings.token_env)), self.settings)

    def close(self) -> None:
        """Take the application down. Serve itself stays until the cluster ends or the next start."""
        if self._app_name is None:
            return
        from ray import serve

        serve.delete(self._app_name)
        self._app_name = None


def _options(settings: RewardSettings, token: str | None) -> ReplicaOptions:
    return ReplicaOptions(
        ranker=None if settings.ranker is None else _absolute(settings.ranker),
        ranker_options=settings.ranker_options,
        list_ranker=settings.list_ranker,
        list_ranker_options=settings.list_ranker_options,
        cache_lists=settings.swaps.cache_lists,
        chunk=settings.chunk,
        threads=settings.threads,
        deadline_s=settings.deadline_s,
        max_body_bytes=int(settings.max_body_mib * 2**20),
        token=token,
    )


def _check_rankers(settings: RewardSettings) -> None:
    if settings.ranker is not None:
        check_ranker(settings.ranker, settings.ranker_options)
    if settings.list_ranker is not None:
        check_list_ranker(settings.list_ranker, settings.list_ranker_options)


def _deployment(settings: RewardSettings) -> Any:
    from ray import serve

    return serve.deployment(
        serve.ingress()(RewardReplica),
        name="RewardReplica",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        max_ongoing_requests=64,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=1.0,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=2,
        logging_config=quiet(),
    )


def serve_at(host: str, port: int, *, section: str) -> tuple[str, int]:
    """Make sure that Ray Serve runs at an address and return it; port 0 takes a free one.

    A Serve instance at another address is replaced when it has no applications.

    Raises:
        RequestError: it has, or the port is in use; names the key of `section`.
    """
    from ray import serve

    running = _running_address()
    if running is not None:
        if running[0] == host and port in (0, running[1]):
            return running
        if serve.status().applications:
            raise RequestError(
                f"{section}.host", f"{host}:{port}", f"{running[0]}:{running[1]}, where Ray Serve already runs here"
            )
        serve.shutdown()
    port = port or free_port(host)
    check_port(host, port, section=section)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet())
    return host, port


def why_not(app_name: str) -> str:
    """The last line that a deployment says about its failure: the error of the ranker's constructor. Empty: none."""
    from ray import serve

    application = serve.status().applications.get(app_name)
    told = [] if application is None else [d.message for d in application.deployments.values()]
    lines = [line.strip() for message in told for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def quiet() -> Any:
    """Serve's logging without a line per request."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def base_url(host: str, port: int, prefix: str) -> str:
    """Where a client on this machine finds an application."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}{prefix.rstrip('/')}"


def free_port(host: str) -> int:
    """A port that is free right now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int, *, section: str = "reward") -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        RequestError: in use, not permitted, or not an address of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RequestError(f"{section}.port", f"{host}:{port} ({error.strerror})", "a free port, or 0") from error


def _absolute(ranker: str) -> str:
    """A path made absolute (replicas run elsewhere); an import path as it is."""
    return str(Path(ranker).resolve()) if Path(ranker).exists() else ranker


def _running_address() -> tuple[str, int] | None:
    """Host and port of the Serve instance that runs in this cluster, None when none does."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    return str(client.http_config.host), int(client.http_config.port)
