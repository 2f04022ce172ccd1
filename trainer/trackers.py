"""Weights & Biases and MLflow, as extras. A continued run continues its tracker run, by an id kept in the folder."""

from __future__ import annotations

import importlib
import importlib.util
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from data.errors import RequestError
from trainer.durable import write_text
from trainer.run_settings import TrackingSettings

IDS = "trackers.json"


class Tracker(Protocol):
    """Where metrics are reported to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report finite metrics of one step."""
        ...

    def close(self) -> None:
        """Finish the tracker's run."""
        ...


class WandbTracker:
    """Weights & Biases."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        wandb = _module("wandb")
        ids = _read_ids(run_dir)
        ids.setdefault("wandb", secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            id=ids["wandb"],
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
        )
        _write_ids(run_dir, ids)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report finite metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the tracker's run."""
        self._run.finish()


class MlflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI or in ./mlruns."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        self._mlflow = _module("mlflow")
        self._mlflow.set_experiment(project)
        ids = _read_ids(run_dir)
        known = ids.get("mlflow")
        run = self._mlflow.start_run(run_id=known, run_name=None if known else run_dir.name)
        if known is None:
            ids["mlflow"] = run.info.run_id
            _write_ids(run_dir, ids)
            self._mlflow.log_dict(dict(config), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report finite metrics of one step."""
        # MLflow refuses the @ of ndcg@10.
        self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Finish the tracker's run."""
        self._mlflow.end_run()


def open_trackers(run_dir: Path, settings: TrackingSettings, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that are switched on.

    Raises:
        RequestError: one of them is not installed.
    """
    trackers: list[Tracker] = []
    if settings.wandb:
        trackers.append(WandbTracker(run_dir, settings.project, config))
    if settings.mlflow:
        trackers.append(MlflowTracker(run_dir, settings.project, config))
    return trackers


def check_trackers(settings: TrackingSettings) -> None:
    """Refuse a tracker that is not installed, before anything is started.

    Raises:
        RequestError: names it.
    """
    for name in ("wandb", "mlflow"):
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            raise _not_installed(name)


def _not_installed(name: str) -> RequestError:
    return RequestError(
        f"tracking.{name}", f"true, but {name} is not installed", f"false, or pip install 'windlass[{name}]'"
    )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _not_installed(name) from error


def _read_ids(run_dir: Path) -> dict[str, str]:
    path = run_dir / IDS
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return ids


def _write_ids(run_dir: Path, ids: Mapping[str, str]) -> None:
    write_text(run_dir / IDS, json.dumps(ids, indent=1) + "\n")
