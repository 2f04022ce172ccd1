"""`windlass bench serve`: the service under load on loopback, and what is left of a process that was killed under it.

The clients live in a process of their own, and each asks again as soon as it is answered. `ours` are `--clients` of
them at once, `one_by_one` is a single one, so that the ratio is what gathering requests into calls of the engines
brings. At last the process that answers is killed under load; Ray Serve starts another, and every request that was ever
answered is looked up in the log.

Who waits for whom:

| who | waits for |
|---|---|
| the command (Ray's driver) | the clients' process, one call at a time |
| clients | the service's answers, at most `_ANSWER_S`; of a killed service, at most `_UP_S` |
| the service | nobody here: it is stopped when the clients are done, and the log is read after that |
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import tyro
from pydantic import Field

from data.feedback_reading import FeedbackChecks, read_feedback
from launch.bench.child import Child, Functions
from launch.bench.frame import Way, answer, paired, ratio
from launch.bench.models import BenchModel, bench_model
from launch.bench.settings import BenchSettings, Device
from launch.cluster import cluster
from launch.continual.cycle import begin_registry
from launch.continual.registry import Registry
from launch.serving.exposure import Serving
from launch.serving.exposure_log import ExposureLog
from launch.serving.served import serving_engines
from launch.serving.service import RecommendService
from launch.serving.settings import ServeSettings
from rollout.settings import RolloutSettings
from trainer.prompt_card import PromptCard
from trainer.run_settings import ClusterSettings

PERCENTILES: Final = (50, 95, 99)
ONE_BY_ONE_REPEATS: Final = 3
BEFORE_KILL, AFTER_KILL = 3, 6
"""Answers per client before the process is killed, and after another one has taken over."""
_ANSWER_S: Final = 60.0
_AGAIN_S: Final = 0.25
"""Pause of a client that was refused, so that the clients leave the cores to the process that starts."""
_UP_S: Final = 300.0
_COUNTERS: Final[Mapping[str, str]] = {
    "requests": "windlass_serve_batch_size_sum",
    "calls": "windlass_serve_batch_size_count",
    "engine_s": "windlass_serve_engine_seconds_total",
    "disk_s": "windlass_serve_disk_seconds_total",
}


class ServeBench(BenchSettings):
    """Arguments of `windlass bench serve`; of the common ones, `--prompts`, `--width`, `--group` and `--device` change
    nothing, and `--prompt-len` is what the histories fill."""

    clients: int = Field(32, ge=1, le=4096)
    """Clients that ask at the same time, each again as soon as it is answered."""
    requests: int = Field(256, ge=1)
    """Requests of one repetition."""
    unauthenticated: bool = False
    """Join a cluster that takes calls without a token."""
    items: int = Field(1, ge=1, le=1024)
    """Items of an answer."""
    serve: Serving = Serving.SAMPLE
    """How it is decoded."""
    engines: int = Field(1, ge=1)
    """Engines that share a batch."""
    max_batch: int = Field(64, ge=1)
    """Most requests that one call of the engines answers."""
    kill: bool = True
    """Kill the process that answers at the end, and count what is lost."""


@dataclass
class Told:
    """What clients were answered."""

    ids: list[str] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    """Of each answer."""
    at_s: list[float] = field(default_factory=list)
    """When each answer came, on a clock of the clients' process."""
    refused: int = 0
    """Requests that got another answer, or none."""
    seconds: float = 0.0


def serve_command(
    settings: Annotated[ServeBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time POST /recommend on loopback, with its tail, and count what a killed server loses."""
    settings.check_device(Device.CPU)
    with bench_model(settings) as model, tempfile.TemporaryDirectory(prefix="windlass-bench-serve-") as name:
        folder = Path(name)
        with (
            running(settings, model, folder) as address,
            Child(clients, address, histories(settings, model), settings.items, environment={}) as child,
        ):
            load = Load(child, settings)
            ways = {
                "ours": load.way(settings.clients, settings.repeats),
                "one_by_one": load.way(1, min(ONE_BY_ONE_REPEATS, settings.repeats)),
            }
            seconds = paired(ways, settings.repeats)
            killed = load.killed() if settings.kill else None
        # Only now: the service alone writes the log while it runs.
        logged = logged_requests(folder / "log", model)
        lost = len(load.answered - logged)
        return answer(
            settings,
            ways,
            seconds,
            checked=not lost and not load.refused and (killed is None or killed["back"]),
            requests_per_s=settings.requests / float(np.median(seconds["ours"])),
            one_by_one_per_s=settings.requests / float(np.median(seconds["one_by_one"])),
            gathering_gain=ratio(seconds, "one_by_one", "ours"),
            latency_ms={"ours": load.latency_ms(settings.clients), "one_by_one": load.latency_ms(1)},
            work=load.work(settings.clients),
            answered=len(load.answered),
            refused=load.refused,
            lost=lost,
            logged_without_answer=len(logged - load.answered),
            killed=killed,
            size=model.record(),
        )


@contextmanager
def running(settings: ServeBench, model: BenchModel, folder: Path) -> Iterator[str]:
    """A service with the model as the only version, while the context is open; yields its address."""
    hf_dir = folder / "model"
    shutil.copytree(model.hf_dir, hf_dir)
    shown = history_items(settings, model)
    PromptCard(history=shown, exclude_seen=True, max_prompt_tokens=1 + shown * model.levels).write(hf_dir)
    begin_registry(Registry(folder / "registry", create=True), hf_dir, at=time.time())
    serving = ServeSettings(
        serve=settings.serve,
        port=0,
        max_items=settings.items,
        max_batch=settings.max_batch,
        max_waiting=max(1024, 2 * settings.clients),
        draw_seed=settings.seed,
        poll_s=60.0,
    )
    threads = max(1, settings.threads // settings.engines)
    rollout = RolloutSettings(dtype=settings.dtype, engines=settings.engines, threads=threads)
    with cluster(ClusterSettings(unauthenticated=settings.unauthenticated)):
        service = RecommendService.start(
            folder / "registry", folder / "log", serving, serving_engines(rollout, serving, width=settings.items)
        )
        try:
            yield service.address
        finally:
            service.stop()


class Load:
    """Repetitions of the clients' work, and what they were answered."""

    def __init__(self, child: Child, settings: ServeBench) -> None:
        self._child = child
        self._settings = settings
        self._latency_s: dict[int, list[float]] = {}
        self._work: dict[int, list[dict[str, float]]] = {}
        self.answered: set[str] = set()
        self.refused = 0
        """Without those of the kill."""

    def way(self, clients: int, repeats: int) -> Way:
        """So many clients at once."""
        return Way(
            time=lambda: self._time(clients),
            warm_up=lambda: self._load(clients, min(self._settings.requests, 4 * clients)),
            repeats=repeats,
            settings={"clients": clients},
        )

    def _load(self, clients: int, requests: int) -> Told:
        told = Told(**self._child.call("load", clients, requests))
        self.answered |= set(told.ids)
        self.refused += told.refused
        return told

    def _time(self, clients: int) -> float:
        before = self._child.call("counters")
        told = self._load(clients, self._settings.requests)
        after = self._child.call("counters")
        self._latency_s.setdefault(clients, []).extend(told.latency_s)
        work = {name: after[name] - before[name] for name in after}
        self._work.setdefault(clients, []).append({**work, "seconds": told.seconds})
        return told.seconds

    def killed(self) -> dict[str, Any]:
        """Kill the process that answers while the clients ask."""
        told, back = self._child.call("storm", self._settings.clients)
        self.answered |= set(told["ids"])
        silent_s = float(np.diff(sorted(told["at_s"])).max())
        return {"answered": len(told["ids"]), "refused": told["refused"], "silent_s": silent_s, "back": back}

    def latency_ms(self, clients: int) -> dict[str, float]:
        """Percentiles over all measured repetitions."""
        return {f"p{p}": 1e3 * float(np.percentile(self._latency_s[clients], p)) for p in PERCENTILES}

    def work(self, clients: int) -> dict[str, float]:
        """Requests per call of the engines, and shares of the time in which engines and disk worked."""
        total = {name: sum(one[name] for one in self._work[clients]) for name in self._work[clients][0]}
        return {
            "requests_per_call": total["requests"] / max(1.0, total["calls"]),
            "engine_share": total["engine_s"] / total["seconds"],
            "disk_share": total["disk_s"] / total["seconds"],
        }


def clients(address: str, histories: list[list[int]], items: int) -> Functions:
    """Clients in a process of their own."""
    import httpx

    bodies = [{"user": row, "history": history, "k": items} for row, history in enumerate(histories)]

    async def ask(count: int, goes_on: Callable[[int], bool], told: Told) -> None:
        limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
        async with httpx.AsyncClient(base_url=address, timeout=_ANSWER_S, trust_env=False, limits=limits) as client:
            numbers = iter(range(10**9))

            async def one_client() -> None:
                while goes_on(number := next(numbers)):
                    begin = time.perf_counter()
                    try:
                        response = await client.post("/recommend", json=bodies[number % len(bodies)])
                    except httpx.TransportError:
                        told.refused += 1
                        await asyncio.sleep(_AGAIN_S)
                        continue
                    if response.status_code != 200:
                        told.refused += 1
                        await asyncio.sleep(_AGAIN_S)
                        continue
                    end = time.perf_counter()
                    told.ids.append(response.json()["request_id"])
                    told.latency_s.append(end - begin)
                    told.at_s.append(end)

            begin = time.perf_counter()
            await asyncio.gather(*(one_client() for _ in range(count)))
            told.seconds = time.perf_counter() - begin

    def load(count: int, requests: int) -> dict[str, Any]:
        told = Told()
        asyncio.run(ask(count, lambda number: number < requests, told))
        return asdict(told)

    def storm(count: int) -> tuple[dict[str, Any], bool]:
        """Ask until the process that answers was killed and another answers, and whether it does."""
        process = int(httpx.get(f"{address}/health", trust_env=False).json()["process"])
        told, end = Told(), time.perf_counter() + _UP_S
        enough = 0

        def back() -> bool:
            return bool(enough and told.refused and len(told.ids) >= enough)

        def goes_on(_: int) -> bool:
            nonlocal enough
            if not enough and len(told.ids) >= BEFORE_KILL * count:
                os.kill(process, signal.SIGKILL)
                enough = len(told.ids) + AFTER_KILL * count
            return not back() and time.perf_counter() < end

        asyncio.run(ask(count, goes_on, told))
        return asdict(told), back()

    def counters() -> dict[str, float]:
        lines = [line.split() for line in httpx.get(f"{address}/metrics", trust_env=False).text.splitlines()]
        return {name: sum(float(line[1]) for line in lines if line[0] == wanted) for name, wanted in _COUNTERS.items()}

    return {"load": load, "storm": storm, "counters": counters, "close": lambda: None}


def logged_requests(log: Path, model: BenchModel) -> set[str]:
    """Close the days as a start two days later would, and read their request ids."""
    window_s = ServeSettings().response_window_s
    ExposureLog(log, window_s=window_s, clock=lambda: time.time() + 3 * window_s).close_days()
    read = read_feedback(log, FeedbackChecks(n_items=model.catalogue.n_items, propensities=False, max_bad_share=0.0))
    return set(read.table["request_id"].to_pylist())


def history_items(settings: ServeBench, model: BenchModel) -> int:
    """Items of a history that fills the prompt."""
    return max(1, (settings.prompt_len - 1) // model.levels)


def histories(settings: ServeBench, model: BenchModel) -> list[list[int]]:
    """Histories that fill the prompt, one per client at least."""
    random = np.random.default_rng(settings.seed)
    shape = (max(64, settings.clients), history_items(settings, model))
    found: list[list[int]] = random.integers(0, model.catalogue.n_items, shape).tolist()
    return found
