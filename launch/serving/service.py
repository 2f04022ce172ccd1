"""The service on Ray Serve: bring-up, the way it is stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.feedback import day_of
from launch.serving.replica import ReplicaOptions, ServingReplica
from launch.serving.served import current_number, open_registry
from launch.serving.settings import ServeSettings
from reward.bearer import required_token
from reward.service import base_url, check_port, quiet, serve_at, why_not
from rollout.settings import RolloutSettings
from trainer.initial_model import CATALOGUE

NAME = "windlass-serve"
_MORE_THAN_WAITING = 64
"""Further requests that the process takes beyond `max_waiting`, to refuse them with a reason."""


def check_service(registry: Path, log: Path, settings: ServeSettings, *, now: float) -> None:
    """Refuse a service that could not be started, before Ray is.

    Raises:
        RequestError: no registry, nothing served, a catalogue that is too small, a log that is no folder or has
            today's rows already, an address without the token, a port in use.
    """
    required_token("--host", settings.host, settings.token_env)
    opened = open_registry(registry)
    catalogue = Catalogue.load(opened.version(current_number(opened)).path / CATALOGUE)
    if settings.beams > catalogue.n_items:
        raise RequestError("--beams", settings.beams, f"at most {catalogue.n_items}, the items of the catalogue")
    if log.exists() and not log.is_dir():
        raise RequestError("--log", f"{log} is no folder", "a folder of a feedback log, which may be new")
    today = log / f"day={day_of(int(now))}"
    if today.exists():
        raise RequestError("--log", f"{today} is there already", "a log that has no rows of today yet")
    if settings.port:
        check_port(settings.host, settings.port, section="-")


class RecommendService:
    """A running service."""

    def __init__(self, settings: ServeSettings, address: str, handle: Any, app_name: str) -> None:
        self.settings = settings
        self.address = address
        """Base URL, e.g. http://127.0.0.1:8000."""
        self._handle = handle
        self._app_name = app_name

    @staticmethod
    def start(registry: Path, log: Path, settings: ServeSettings, rollout: RolloutSettings) -> RecommendService:
        """Start the application in the connected Ray cluster and wait until it answers.

        Raises:
            RequestError: an address without the token, or in use.
            RunError: the application did not come up.
        """
        token = required_token("--host", settings.host, settings.token_env)
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        host, port = serve_at(settings.host, settings.port, section="-")
        options = ReplicaOptions(
            registry=registry.resolve(), log=log.resolve(), settings=settings, rollout=rollout, token=token
        )
        service = RecommendService(settings, base_url(host, port, "/"), None, NAME)
        deployment = _deployment(settings).bind(options)
        try:
            service._handle = serve.run(deployment, name=NAME, route_prefix="/", logging_config=quiet())
        except RuntimeError as error:
            why = why_not(NAME) or str(error)
            serve.delete(NAME)
            raise RunError(f"the service did not start: {' '.join(why.split())}") from error
        return service

    def stop(self) -> dict[str, int]:
        """Refuse what is new, answer what is under way, end.

        Returns:
            See `ServingReplica.drain`.
        """
        from ray import serve

        told: dict[str, int] = self._handle.drain.remote().result(timeout_s=self.settings.drain_s + 60)
        serve.delete(self._app_name)
        return told


def _deployment(settings: ServeSettings) -> Any:
    from ray import serve

    return serve.deployment(
        serve.ingress()(ServingReplica),
        name="ServingReplica",
        # One process writes the log; `rollout.engines` is how it grows.
        num_replicas=1,
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=settings.max_waiting + _MORE_THAN_WAITING,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=2,
        logging_config=quiet(),
    )
