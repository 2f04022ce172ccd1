"""`windlass serve`: answer requests with the served version of a registry, and keep the feedback log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import tyro

from launch.cluster import cluster
from launch.serving.served import serving_engines
from launch.serving.settings import ServeSettings
from rollout.settings import RolloutSettings
from trainer.interruption import Interruption
from trainer.run_settings import ClusterSettings

_TICK_S = 0.2


class ServeCommand(ServeSettings):
    """Arguments of `windlass serve`."""

    registry: tyro.conf.Positional[Path]
    """The registry whose current version answers; it is followed when it changes."""
    log: Path
    """The feedback log, a folder on this machine; made when missing."""
    rollout: RolloutSettings = RolloutSettings()
    """The engines (`--rollout.engine reference` needs no vLLM); how they decode is told by the arguments above."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""

    def settings(self) -> ServeSettings:
        """What the service itself needs."""
        return ServeSettings(**self.model_dump(include=set(ServeSettings.model_fields)))


def serve_command(
    arguments: Annotated[ServeCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> int:
    """Answer POST /recommend and POST /feedback until SIGTERM; see docs/serving.md."""
    from launch.serving.service import RecommendService, check_service

    settings = arguments.settings()
    engines = serving_engines(arguments.rollout, settings, width=max(settings.beams, settings.max_items))
    check_service(arguments.registry, arguments.log, settings, now=time.time() + settings.test_clock_s)
    with Interruption() as interruption, cluster(arguments.cluster, quiet=False):
        service = RecommendService.start(arguments.registry, arguments.log, settings, engines)
        print(f"windlass serve: {service.address} answers; the log is {arguments.log}", flush=True)
        while not interruption.requested:
            time.sleep(_TICK_S)
        left = service.stop()
    print(f"windlass serve: ended; {left['open_requests']} requests wait for responses in the log", flush=True)
    return 1 if left["unanswered"] else 0
