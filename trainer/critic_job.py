"""Critic jobs: train a critic on the gains that its own users gave, and write it as a ranker with its calibration.

The users are `lists.critic_users` of the training split's, by the seed of the lists; a policy with the same section
`lists` trains on the others. A critic sees the outcomes that training sees (`lists.feedback`): the gains of next
events, and the zeros of candidates that the user did not turn to.

An interrupted job leaves no artefact and starts again; it takes seconds to minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.records import Prompt
from reward.artefact import DESCRIPTION, RankerArtefact
from trainer.critic_training import ObservedGains, TrainingStoppedError, train_critic
from trainer.jobs import CriticJob
from trainer.list_data import ListData, list_catalogue
from trainer.list_settings import ListSettings
from trainer.ranker_training import compute_threads

KIND = "critic"


@dataclass(frozen=True, kw_only=True)
class CriticOutcome:
    """Outcome of a critic job."""

    folder: Path
    digest: str
    """Digest of the weights; empty when the job was interrupted."""
    facts: Mapping[str, Any]
    """Calibration, epochs and counts, as the summary tells them; empty when the job was interrupted."""


def run_critic(
    job: CriticJob,
    folder: Path,
    *,
    log: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> CriticOutcome:
    """Train the critic of a job into `folder`; a finished artefact of the same job and data is returned as it is.

    Args:
        folder: of the ranker artefact.
        log: receives (epoch, metrics).
        interrupted: asked after every epoch.

    Raises:
        RequestError: the folder holds the artefact of another job or dataset, or the data have no gains to train on.
        RunError: a loss that is not finite.
    """
    dataset = Dataset.open(job.data.dataset)
    identity = _identity(job, dataset)
    if (folder / DESCRIPTION).is_file():
        return _finished(folder, identity)
    catalogue = list_catalogue(Catalogue.build(dataset, job.data.codes), job.lists)
    batch = ListData.open(dataset, catalogue, job.lists, job.data).training(critic=True)
    gains = observed_gains(batch.prompts, job.lists.trained())
    try:
        with compute_threads(job.critic.threads):
            trained = train_critic(
                gains,
                dataset.n_items,
                job.lists.trained(),
                job.critic,
                history=job.data.history,
                seed=job.seed,
                log=log,
                interrupted=interrupted,
            )
    except TrainingStoppedError:
        return CriticOutcome(folder=folder, digest="", facts={})
    by_need = {need: one.report() for need, one in trained.by_need.items()}
    facts = {
        "calibration": trained.calibration.report() | {"needs": by_need},
        "epochs": len(trained.losses),
        "selection": {
            "metric": "validation/loss",
            "best_step": trained.epoch,
            "best_score": trained.losses[trained.epoch - 1],
        },
        "gains": {
            "observed": len(gains),
            "above_zero": int((gains.gain_N > 0).sum()),
            "users": len(np.unique(gains.user_N)),
            "prompts": len(batch),
        },
        "prompts": {reason: count for reason, count in batch.counts.items() if count},
    }
    lists = job.lists.model_dump(mode="json")
    digest = trained.ranker.save(folder, {**identity, "lists": lists, "facts": facts})
    return CriticOutcome(folder=folder, digest=digest, facts=facts)


def finished_epochs(folder: Path) -> int | None:
    """Epochs of the finished critic in a folder, None where there is none."""
    if not (folder / DESCRIPTION).is_file():
        return None
    return int(RankerArtefact.open(folder).provenance["facts"]["epochs"])


def observed_gains(prompts: Sequence[Prompt], needs: Sequence[str]) -> ObservedGains:
    """One sample per candidate whose outcome was observed, in the order of the prompts.

    Args:
        needs: names, whose places are the codes of the samples.

    Raises:
        RequestError: no outcome was observed.
        ValueError: a prompt without candidates or gains, or of another need.
    """
    rows = [_observed(prompt) for prompt in prompts]
    counts = [len(columns) for _, columns, _ in rows]
    if not sum(counts):
        raise RequestError("lists.feedback", f"no outcome of {len(prompts)} prompts is seen", "a larger share")
    return ObservedGains(
        user_N=np.repeat(np.array([prompt.user_id for prompt in prompts], np.int32), counts),
        histories=[prompt.history for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)],
        item_N=np.concatenate([items[columns] for items, columns, _ in rows]).astype(np.int32),
        need_N=np.repeat(np.array([needs.index(prompt.need) for prompt in prompts], np.int32), counts),
        gain_N=np.concatenate([gains[columns] for _, columns, gains in rows]).astype(np.float64),
    )


def _observed(prompt: Prompt) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates, columns of those that were observed, and gains."""
    if prompt.candidates is None or prompt.gain_C is None:
        raise ValueError(f"prompt {prompt.prompt_id} ranks nothing, or has no gains")
    seen_C = np.ones(len(prompt.gain_C), dtype=bool) if prompt.observed_C is None else prompt.observed_C
    return prompt.candidates, np.flatnonzero(seen_C), prompt.gain_C


def check_critic(artefact: RankerArtefact, lists: ListSettings) -> None:
    """Refuse a critic that a policy with these lists may not be rewarded by.

    Raises:
        RequestError: it does not know a need that the policy trains, or it was trained on users of the policy.
    """
    if artefact.kind != KIND:
        return
    known = tuple(artefact.options.get("needs", ()))
    missing = [need for need in lists.trained() if need not in known]
    if missing:
        found = f"{artefact.folder} knows the needs {', '.join(known)}"
        raise RequestError("reward.ranker", found, f"a critic of {', '.join(lists.trained())}")
    told = artefact.provenance.get("lists")
    if not isinstance(told, Mapping):
        return
    for name in ("critic_users", "seed"):
        own = getattr(lists, name)
        if told.get(name) != own:
            found = f"{own}, but the critic {artefact.folder} was trained with {told.get(name)}"
            raise RequestError(f"lists.{name}", found, "the critic's, so that the policy trains on none of its users")


def _identity(job: CriticJob, dataset: Dataset) -> dict[str, object]:
    """What must be equal for an artefact to belong to this job."""
    relevant = job.model_dump(mode="json", exclude={"tracking"})
    relevant["data"]["dataset"] = dataset.fingerprint
    return {"job": xxhash.xxh3_128_hexdigest(json.dumps(relevant).encode()), "dataset": dataset.fingerprint}


def _finished(folder: Path, identity: Mapping[str, object]) -> CriticOutcome:
    artefact = RankerArtefact.open(folder)
    if artefact.provenance.get("job") != identity["job"]:
        raise RequestError(str(folder), "of another job or dataset", "the same configuration, or a new folder")
    return CriticOutcome(folder=folder, digest=artefact.digest, facts=artefact.provenance["facts"])
