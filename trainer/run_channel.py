"""The weight channel of a run: from its learners to its fleet, and what the last push leaves in the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue
from data.errors import RequestError
from rollout.channel import KeepPush, WeightChannel
from rollout.fleet import RolloutFleet
from rollout.peers import RayPeer
from rollout.probe import item_probe
from trainer.jobs import RlJob, SftJob
from trainer.learner_group import LearnerGroup

KEPT = "weights"
"""Folder of the run with what the last push leaves behind."""


@contextmanager
def kept_folder(job: SftJob | RlJob, run_dir: Path) -> Iterator[Path | None]:
    """Folder of what the last push leaves behind; none where nothing is kept. Empty before and gone afterwards."""
    keep, folder = job.weights.keep, run_dir / KEPT
    shutil.rmtree(folder, ignore_errors=True)
    if keep is KeepPush.NEVER or (keep is KeepPush.AUTO and not ahead(job)):
        yield None
        return
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ahead(job: SftJob | RlJob) -> bool:
    """Whether batches are collected while the learners work."""
    return isinstance(job, RlJob) and job.max_staleness > 0


def weight_channel(
    job: SftJob | RlJob,
    catalogue: Catalogue,
    learners: LearnerGroup,
    fleet: RolloutFleet,
    *,
    keep: Path | None = None,
) -> WeightChannel:
    """The channel from the learners to the fleet; a failed engine is restarted in place.

    Raises:
        RequestError: the engines apply an adapter, which whole matrices would not fit.
    """
    if job.rollout.adapter is not None:
        raise RequestError("rollout.adapter", job.rollout.adapter, "none in a job that trains")

    def replaced(engine_id: str) -> RayPeer:
        return RayPeer(engine_id, [fleet.restart(engine_id)])

    paths = [catalogue.tokens(item) for item in range(catalogue.n_items)]
    types: set[Any] = {job.learner.dtype.value, job.rollout.dtype.value}
    return WeightChannel(
        settings=job.weights.model_copy(update={"host": job.weights.host or learners.host}),
        source=learners.source,
        engines={engine_id: RayPeer(engine_id, [actor]) for engine_id, actor in fleet.engines.items()},
        probe=item_probe(paths, bos=catalogue.vocabulary.bos, seed=job.seed),
        dtype="bfloat16" if "bfloat16" in types else "float32",
        workers_per_engine=job.rollout.tensor_parallel,
        replace=replaced,
        keep=keep,
    )
