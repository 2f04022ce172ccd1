"""A run's folder: its configuration, its environment, its lock, its summary.

config.yaml        the resolved configuration of the newest start
environment.json   what it ran on, one entry per start
metrics.jsonl      one object per step (`trainer.run_log`)
tensorboard/       the same as event files
checkpoints/       `trainer.checkpoints`
rows/              metrics per evaluated row (`trainer.row_metrics`), for paired comparisons
summary.json       results; written last
.lock              held while a process works here
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from data.errors import RequestError
from launch.config import job_from, read_recipe, to_mapping, to_yaml
from trainer.durable import write_text
from trainer.jobs import Job

FORMAT = 1
SUMMARY = "summary.json"
MAY_CHANGE = (
    "limits",
    # Not its rows, cut-offs (the largest is the width of the beams) and metric: the best checkpoint of the run is
    # selected among scores from before and after.
    "evaluation.every",
    "evaluation.batch",
    "evaluation.unconstrained_rows",
    "evaluation.test_rows",
    "evaluation.test_unconstrained_rows",
    "early_stopping",
    "checkpoints",
    "tracking",
    "cluster",
    "policy_gap",
    "learner.ranks",
    "learner.zero_stage",
    "learner.token_budget",
    "learner.threads",
    "learner.activation_checkpointing",
    "learner.timeout_s",
    "weights.host",
    "weights.keep",
    "rollout.engines",
    "rollout.threads",
    "rollout.gpus",
    "rollout.kv_cache_gib",
    "rollout.sleeps",
    "rollout.start_deadline_s",
    "rollout.deadline_s",
    "reward.transport",
    "reward.url",
    "reward.host",
    "reward.port",
    "reward.token_env",
    "reward.replicas",
    "reward.threads",
    "reward.num_cpus",
    "reward.num_gpus",
    "reward.deadline_s",
    "reward.retries",
    "reward.backoff_s",
    "reward.max_body_mib",
    "reward.max_failed_share",
    "reward.max_failed_steps",
    "laac.ranks",
    "laac.threads",
    "laac.timeout_s",
    "data.dataset",
)
"""Keys (and what is below them) that a continued run may have otherwise than it began. Everything else would make the
later steps part of another experiment. The dataset may have moved: the data cursor compares fingerprints."""


class RunDirectory:
    """A run folder that this process holds; use as a context manager."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, path: Path, job: Job, *, command: Sequence[str] = ()) -> RunDirectory:
        """Create the folder or continue in it; writes config.yaml and an entry in environment.json.

        Raises:
            RequestError: another process holds it, it belongs to another configuration, or it cannot be written.
        """
        path = path.expanduser().resolve()
        try:
            # Neither this process nor those it starts leave anything that everyone may write.
            os.umask(os.umask(0o077) | stat.S_IWOTH)
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise RequestError("--run-dir", f"{path}: {error.strerror}", "a folder that can be written") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise RequestError(
                "--run-dir", f"{path} is in use by process {holder or 'unknown'}", "another folder, or wait"
            ) from error
        run = cls(path, lock)
        try:
            if path.stat().st_mode & stat.S_IWOTH:
                raise RequestError("--run-dir", f"{path} may be written by everyone", f"chmod o-w {path}")
            run._claim(job, command)
        except BaseException:
            lock.close()
            raise
        return run

    def _claim(self, job: Job, command: Sequence[str]) -> None:
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        config = self.path / "config.yaml"
        if config.is_file() and has_begun(self.path):
            refuse_other_experiment(config, to_mapping(job))
        write_text(config, f"# windlass run configuration, format {FORMAT}\n" + to_yaml(job))
        from launch.provenance import environment

        entries = self.environment()
        entries.append({"started": time.time(), "command": ["windlass", *command], **environment()})
        write_text(self.path / "environment.json", json.dumps(entries, indent=2, default=str) + "\n")

    def environment(self) -> list[dict[str, Any]]:
        """The entries of environment.json, one per start."""
        file = self.path / "environment.json"
        if not file.is_file():
            return []
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(str(file), f"is not JSON ({error})", "the file as it was written, or none") from error
        if not isinstance(entries, list):
            raise RequestError(str(file), f"holds {type(entries).__name__}", "a JSON list, one entry per start")
        return entries

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, atomically."""
        content = {"format": FORMAT, **summary}
        write_text(self.path / SUMMARY, json.dumps(content, indent=2, default=str) + "\n")

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def has_begun(path: Path) -> bool:
    """True once a run has left something of its own; a start that was refused leaves a configuration only."""
    metrics = path / "metrics.jsonl"
    return (
        (metrics.is_file() and metrics.stat().st_size > 0)
        or any((path / "checkpoints").glob("step-*"))
        or (path / "ranker").exists()
    )


def refuse_other_experiment(config: Path, wanted: Mapping[str, Any], *, known: bool = False) -> None:
    """Refuse to continue a run with a key that makes it another experiment.

    A setting that the run's version did not have counts as its default, so that runs outlive an update of windlass.

    Args:
        config: of the run.
        wanted: the configuration that is asked for.
        known: leave out keys that are gone since: a run that is finished may be of an earlier version.

    Raises:
        RequestError: names the first such key with both values.
    """
    before = dict(leaves(_as_read_now(read_recipe(config))))
    after = dict(leaves(wanted))
    names = [n for n in after if n in before] if known else [*after, *(n for n in before if n not in after)]
    for name in names:
        if before.get(name) != after.get(name) and not _may_change(name):
            raise RequestError(
                name,
                f"{after.get(name)!r}, but the run in {config.parent} was started with {before.get(name)!r}",
                "the same value, or another --run-dir",
            )


def _as_read_now(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's configuration with every setting of today; as it is where today refuses it, to be named key by key."""
    try:
        return to_mapping(job_from(content))
    except RequestError:
        return content


def _may_change(name: str) -> bool:
    return any(name == key or name.startswith(key + ".") for key in MAY_CHANGE)


def leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every value that is no mapping."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        RequestError: absent, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(str(path), error.strerror or str(error), "a run directory with this file") from error
    except ValueError as error:
        raise RequestError(str(path), f"is not JSON ({error})", "a JSON object") from error
    if not isinstance(content, dict):
        raise RequestError(str(path), f"holds {type(content).__name__}", "a JSON object")
    return content
