"""The fleet: engines as Ray actors, requests cut into shards, and one answer in the order of the request.

A shard is a fixed run of `shard_size` prompts, handed to whichever engine is free. What comes back does not depend on
the engine (see `rollout.decoding`), so neither does the answer. An engine that dies, raises or falls silent ends the
request with `EngineFailure`; nothing waits for ever.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue
from data.errors import RequestError, RunError, WindlassError
from data.records import DecodeSpec, FloatArray, Groups, IntArray, Prompt
from rollout import vllm_internals as internals
from rollout.engine import engine_class, longest_sequence
from rollout.group_decoder import has_exclusions
from rollout.list_violations import ListViolation
from rollout.settings import EngineKind, RolloutSettings
from rollout.violations import Violation, ViolationCounter


class EngineFailure(RunError):
    """An engine died, raised an error, or did not answer in time; the message names it and repeats its error."""

    def __init__(self, engine_id: str, what: str) -> None:
        super().__init__(engine_id, what)
        self.engine_id = engine_id
        self.what = what

    def __str__(self) -> str:
        return f"{self.engine_id}: {self.what}"


@dataclass
class RolloutFleet:
    """Engine actors under Ray. Make one with `start`."""

    settings: RolloutSettings
    hf_dir: Path
    engines: dict[str, Any]
    """Actor handles by engine id; their methods are those of `rollout.engine.Engine`."""
    _violations: ViolationCounter
    _actor_options: Mapping[str, Any]
    violations: Counter[Violation | ListViolation] = field(default_factory=Counter)
    """`constraint.violations`: over all requests so far, by reason; must stay 0."""
    shards: Counter[str] = field(default_factory=Counter)
    """Shards answered, by engine."""

    @staticmethod
    def start(
        settings: RolloutSettings,
        hf_dir: Path,
        catalogue: Catalogue,
        *,
        actor_options: Mapping[str, Any] | None = None,
    ) -> RolloutFleet:
        """Start the engines side by side; Ray must be initialised.

        Args:
            settings: the engines.
            hf_dir: folder with model, tokenizer and `catalogue/`, seen by every node.
            catalogue: what returned items are checked against, by independent code.
            actor_options: further options of the Ray actors.

        Raises:
            RequestError: a setting that the model or the cluster cannot meet.
            EngineFailure: an engine did not come up in time.
        """
        longest_sequence(settings, Path(hf_dir))
        _check_resources(settings)
        options = dict(actor_options or {})
        fleet = RolloutFleet(settings, Path(hf_dir), {}, ViolationCounter(catalogue), options)
        try:
            for index in range(settings.engines):
                engine_id = f"{settings.engine.value}-{index}"
                fleet.engines[engine_id] = fleet._launch(engine_id)
            fleet._await_start(list(fleet.engines))
        except BaseException:
            fleet.close()
            raise
        return fleet

    def _launch(self, engine_id: str) -> Any:
        import ray

        settings = self.settings
        runtime_env = dict(self._actor_options.get("runtime_env", {}))
        runtime_env["env_vars"] = {
            **internals.environment(threads=settings.compute_threads),
            **runtime_env.get("env_vars", {}),
        }
        options = {
            "num_cpus": 1,
            "num_gpus": settings.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            **self._actor_options,
            "runtime_env": runtime_env,
        }
        actor = ray.remote(engine_class(settings)).options(**options)
        return actor.remote(settings, self.hf_dir.absolute(), engine_id=engine_id)

    def _await_start(self, engine_ids: Sequence[str]) -> None:
        deadline = time.monotonic() + self.settings.start_deadline_s
        for engine_id in engine_ids:
            ready = self.engines[engine_id].describe.remote()
            self._result(engine_id, ready, max(0.0, deadline - time.monotonic()), "coming up")

    def _result(self, engine_id: str, reference: Any, timeout_s: float, doing: str) -> Any:
        """The value of a call; the engine's own error, or EngineFailure when it died or the time is over."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError as error:
            raise EngineFailure(engine_id, f"no answer within {timeout_s:.0f} s, {doing}") from error
        except RayTaskError as error:
            # A wrong request is the caller's to mend; anything else is the engine's failure, in its own words.
            if isinstance(error.cause, WindlassError):
                raise error.cause from error
            raise EngineFailure(engine_id, f"{doing}: {type(error.cause).__name__}: {error.cause}") from error
        except RayActorError as error:
            raise EngineFailure(engine_id, f"died, {doing}: {_cause_of_death(error)}") from error

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        """Complete every prompt; see `rollout.engine.Engine.generate`.

        Raises:
            RequestError: the prompts or the spec cannot be decoded.
            EngineFailure: an engine died, raised or fell silent.
            RunError: an engine's weights are broken or in transit, or engines hold different versions.
        """
        if not prompts:
            raise RequestError("prompts", "none", "at least one")
        size = self.settings.shard_size
        exclude = has_exclusions(prompts)
        shards = [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        parts = self._dispatch(
            [("generate", (shard, spec), {"exclude": exclude}) for shard in shards],
        )
        groups = Groups.concat(parts)
        if len(set(groups.weight_version_P.tolist())) > 1:
            found = sorted(set(groups.weight_version_P.tolist()))
            raise RunError(f"the engines answered with weight versions {found}; one request needs one version")
        self.violations.update(self._violations.count(prompts, groups))
        return groups

    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probabilities of each completion token; see `rollout.engine.Engine.score`."""
        size = self.settings.shard_size
        calls: list[_Call] = [
            ("score", (list(prompts[start : start + size]), list(completions[start : start + size])), {})
            for start in range(0, len(prompts), size)
        ]
        return [logp for part in self._dispatch(calls) for logp in part]

    def _dispatch(self, calls: Sequence[_Call]) -> list[Any]:
        """Results of the calls, in their order; each goes to the engine that is free first."""
        import ray

        waiting = deque(range(len(calls)))
        idle = deque(self.engines)
        running: dict[Any, tuple[int, str, float]] = {}
        results: list[Any] = [None] * len(calls)
        # After a failure the calls still under way run out by themselves: a cancelled one leaves a gap in the actor's
        # sequence of calls, for which Ray then waits 30 s.
        while waiting or running:
            while waiting and idle:
                index, engine_id = waiting.popleft(), idle.popleft()
                method, arguments, named = calls[index]
                reference = getattr(self.engines[engine_id], method).remote(*arguments, **named)
                running[reference] = index, engine_id, time.monotonic() + self.settings.deadline_s
            soonest = min(deadline for _, _, deadline in running.values())
            ready, _ = ray.wait(list(running), timeout=max(0.0, soonest - time.monotonic()))
            if not ready:
                _, engine_id, _ = min(running.values(), key=lambda entry: entry[2])
                raise EngineFailure(engine_id, f"no answer within rollout.deadline_s, {self.settings.deadline_s} s")
            index, engine_id, _ = running.pop(ready[0])
            results[index] = self._result(engine_id, ready[0], self.settings.deadline_s, f"shard {index}")
            self.shards[engine_id] += 1
            idle.append(engine_id)
        return results

    def restart(self, engine_id: str) -> Any:
        """Kill an engine and start a fresh one in its place, with the weights of `hf_dir`; returns its handle."""
        import ray

        ray.kill(self.engines[engine_id])
        self.engines[engine_id] = self._launch(engine_id)
        self._await_start([engine_id])
        return self.engines[engine_id]

    def describe(self) -> dict[str, str | int]:
        """Name, version and number of the engines."""
        engine_id, engine = next(iter(self.engines.items()))
        told = self._result(engine_id, engine.describe.remote(), self.settings.deadline_s, "describing itself")
        return {**told, "count": len(self.engines)}

    def close(self) -> None:
        """End the engines."""
        import ray

        for engine in self.engines.values():
            ray.kill(engine)
        self.engines.clear()


_Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Method, positional and named arguments."""


def _cause_of_death(error: BaseException) -> str:
    """One line: the error of the constructor, or why the process ended."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in lines[0] else lines[0]


def _check_resources(settings: RolloutSettings) -> None:
    """Refuse what the cluster can never give, instead of waiting for it."""
    import ray

    total = ray.cluster_resources()
    if total.get("CPU", 0) < settings.engines:
        raise RequestError(
            "rollout.engines", settings.engines, f"at most {int(total.get('CPU', 0))}, the cluster's CPUs"
        )
    if total.get("GPU", 0) < settings.gpus * settings.engines:
        raise RequestError("rollout.gpus", settings.gpus, f"{total.get('GPU', 0)} GPUs in the cluster in all")
    if settings.engine is EngineKind.VLLM and settings.gpus == 0 and settings.block_size % 32:
        raise RequestError("rollout.block_size", settings.block_size, "a multiple of 32 on CPU")
