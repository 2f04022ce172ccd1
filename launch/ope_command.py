"""`windlass ope`: what a policy would have earned, from the log of another one.

`ope bandit` takes the Open Bandit sample, where both policies have a log: the estimate of each from the other's log can
be held against what it earned itself. `ope model` takes a model and a feedback log.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro
from pydantic import Field

from data.catalogue import Catalogue
from data.feedback import FeedbackLog
from data.feedback_reading import FeedbackChecks
from data.open_bandit import BanditLog, Campaign, LoggingPolicy, open_bandit
from data.settings import Settings
from launch.cluster import cluster
from launch.continual.measuring import HeldOut, Measurer, MeasureSettings
from reward.bootstrap import bootstrap_mean
from reward.direct_model import user_halves
from reward.off_policy import DoubleArray, LoggedExposures, PolicyValue, policy_value
from rollout.fleet import RolloutFleet
from rollout.settings import RolloutSettings
from trainer.checkpoints import open_model
from trainer.initial_model import CATALOGUE
from trainer.run_settings import ClusterSettings


class OpeSettings(Settings):
    """Arguments that both commands have."""

    weight_clip: float = Field(1e6, gt=0)
    """Importance weights are cut to it, and counted."""
    seed: int = Field(0, ge=0)
    """Of the resamples."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples, of whole users."""
    level: float = Field(0.95, gt=0, lt=1)
    """Coverage that the intervals aim at."""


class OpeBandit(OpeSettings):
    """Arguments of `windlass ope bandit`."""

    path: Path | None = None
    """Folder with bandit.parquet, or like obp/dataset/obd; may be left out where the obp wheel is installed."""


def ope_bandit_command(
    arguments: Annotated[OpeBandit, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Estimate each policy of the Open Bandit sample from the other one's log, beside what it earned itself."""
    estimates = []
    for campaign in Campaign:
        logs = {policy: open_bandit(arguments.path, campaign, policy) for policy in LoggingPolicy}
        for evaluated in LoggingPolicy:
            logging = next(policy for policy in LoggingPolicy if policy is not evaluated)
            found = bandit_value(logs[logging], logs[evaluated], evaluated, arguments)
            response_N, user_N = _clicks(logs[evaluated].log)
            own = bootstrap_mean(response_N, cluster_N=user_N, **_how(arguments))
            estimates.append(
                {
                    "campaign": campaign.value,
                    "policy": evaluated.value,
                    "log": logging.value,
                    "rows": len(logs[logging].log),
                    "estimates": value_record(found),
                    "earned": {**own.record(), "width": own.high - own.low},
                }
            )
    tell(estimates)
    return {"level": arguments.level, "seed": arguments.seed, "values": estimates}


def bandit_value(logged: BanditLog, own: BanditLog, evaluated: LoggingPolicy, arguments: OpeSettings) -> PolicyValue:
    """The value of a policy from the other one's log.

    The random policy is uniform. That of Thompson sampling, which knows the position and no user, is how often each
    item was shown at each position in its own log: the mean policy over the time of the sample. The direct model of the
    doubly robust estimate is the share of clicks of an item, from the other half of the users.
    """
    anchors, rows = logged.log.anchors(), len(logged.log)
    position_N, probability_KA = _positions(logged.log), _policy(own, evaluated)
    policy_NA = probability_KA[position_N]
    response_N, user_N = _clicks(logged.log)
    with np.errstate(divide="ignore"):
        logp_N = np.log(policy_NA[np.arange(rows), anchors.item_N])
    shown_N, mean_N = _direct_model(anchors.item_N, response_N, user_N, policy_NA, logged.n_items)
    return policy_value(
        LoggedExposures(
            response_N=response_N,
            logp_N=logp_N,
            logp0_N=anchors.logp0_N.astype(np.float64),
            model_shown_N=shown_N,
            model_policy_N=mean_N,
            user_N=user_N,
        ),
        weight_clip=arguments.weight_clip,
        **_how(arguments),
    )


def _policy(own: BanditLog, policy: LoggingPolicy) -> DoubleArray:
    """[K, A] probability of each item at each position."""
    if policy is LoggingPolicy.RANDOM:
        positions = int(_positions(own.log).max()) + 1
        return np.full((positions, own.n_items), 1 / own.n_items)
    position_N, item_N = _positions(own.log), own.log.anchors().item_N
    count_KA = np.zeros((int(position_N.max()) + 1, own.n_items))
    np.add.at(count_KA, (position_N, item_N), 1)
    share_KA: DoubleArray = count_KA / count_KA.sum(1, keepdims=True)
    return share_KA


def _direct_model(
    item_N: npt.NDArray[np.integer],
    response_N: DoubleArray,
    user_N: npt.NDArray[np.integer],
    policy_NA: DoubleArray,
    items: int,
) -> tuple[DoubleArray, DoubleArray]:
    """Predictions for the shown items and means over the policy, by the other half of the users."""
    half_N = user_halves(user_N)
    shown_N, mean_N = np.zeros(len(item_N)), np.zeros(len(item_N))
    for mine_N in (half_N, ~half_N):
        other_N = ~mine_N
        clicks_A = np.bincount(item_N[other_N], weights=response_N[other_N], minlength=items)
        shows_A = np.bincount(item_N[other_N], minlength=items)
        rate = response_N[other_N].mean()
        # Ten exposures at the mean rate are added to each item: few have a click at all.
        model_A = (clicks_A + 10 * rate) / (shows_A + 10)
        shown_N[mine_N] = model_A[item_N[mine_N]]
        mean_N[mine_N] = policy_NA[mine_N] @ model_A
    return shown_N, mean_N


def _positions(log: FeedbackLog) -> npt.NDArray[np.int64]:
    need = [int(text.removeprefix("position ")) for text in log.table["need"].to_pylist()]
    return np.unique(need, return_inverse=True)[1].reshape(-1)


def _clicks(log: FeedbackLog) -> tuple[DoubleArray, npt.NDArray[np.integer]]:
    return log.anchors().response_N.astype(np.float64), log.table["user_id"].to_numpy()


class OpeModel(OpeSettings):
    """Arguments of `windlass ope model`."""

    checkpoint: tyro.conf.Positional[Path]
    """The policy that is evaluated: a run folder (its best checkpoint), a checkpoint, or an hf folder."""
    log: Path
    """Feedback log with propensities, of another policy."""
    rows: int = Field(2000, ge=1)
    """Rows of the log, a seeded sample."""
    ranker: Path | None = None
    """Ranker whose scores are the direct model of the doubly robust estimate; without one there is no such estimate."""
    draws: int = Field(16, ge=1)
    """Draws per context over which the direct model is averaged."""
    batch: int = Field(128, ge=1)
    """Prompts per forward pass."""
    rollout: RolloutSettings = RolloutSettings()
    """The engines, which draw for the direct model."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""


def ope_model_command(
    arguments: Annotated[OpeModel, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Estimate what a model that serves by sampling would have earned, from the log of another policy."""
    hf_dir = open_model(arguments.checkpoint)
    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    # Retiring items changes the digest; the log may be older.
    whole = dataclasses.replace(catalogue, active=np.ones_like(catalogue.active))
    checks = FeedbackChecks(
        n_items=catalogue.n_items, active_I=catalogue.active, catalogues=frozenset({catalogue.digest, whole.digest})
    )
    settings = MeasureSettings(
        rows=arguments.rows,
        seed=arguments.seed,
        resamples=arguments.resamples,
        batch=arguments.batch,
        weight_clip=arguments.weight_clip,
        ranker=arguments.ranker,
        draws=arguments.draws,
    )
    held_out = HeldOut.read(arguments.log, trained=arguments.log, checks=checks, settings=settings)
    log = held_out.log

    def start(model: Path, catalogue: Catalogue) -> RolloutFleet:
        return RolloutFleet.start(arguments.rollout, model, catalogue)

    measurer = Measurer(start, None, held_out)
    if arguments.ranker is None:
        found = measurer.value(hf_dir, level=arguments.level)
    else:
        with cluster(arguments.cluster):
            found = measurer.value(hf_dir, level=arguments.level)
    rows = held_out.rows
    user_N = log.samples().user_id_N[rows]
    own = bootstrap_mean(log.anchors().response_N[rows].astype(np.float64), cluster_N=user_N, **_how(arguments))
    answer: dict[str, Any] = {
        "checkpoint": str(hf_dir),
        "log": str(arguments.log),
        "level": arguments.level,
        "seed": arguments.seed,
        "rows": len(rows),
        "left_out": {reason: count for reason, count in log.counts.items() if count},
        "estimates": value_record(found),
        "logged": {**own.record(), "width": own.high - own.low},
    }
    for name, one in answer["estimates"]["values"].items():
        print(f"{name}: {interval(one)}")
    print(
        f"the log's own policy: {interval(answer['logged'])}; effective sample size {found.effective_sample_size:.1f}"
    )
    return answer


def value_record(found: PolicyValue) -> dict[str, Any]:
    """Estimates with the widths of their intervals, and how far the weights can be trusted."""
    return {
        "values": {
            estimator.value: {**one.record(), "width": one.high - one.low} for estimator, one in found.estimates.items()
        },
        "effective_sample_size": found.effective_sample_size,
        "weight_mean": found.weight_mean,
        "weight_max": found.weight_max,
        "clipped": found.clipped,
    }


def tell(estimates: list[dict[str, Any]]) -> None:
    """A line per policy and estimate."""
    for one in estimates:
        values = one["estimates"]
        size = f"effective sample size {values['effective_sample_size']:.1f} of {one['rows']}"
        print(f"{one['campaign']}: {one['policy']} from the log of {one['log']}, {size}")
        print(f"  earned {interval(one['earned'])}")
        for name, found in values["values"].items():
            print(f"  {name:<6} {interval(found)}")


def interval(found: dict[str, float]) -> str:
    """An estimate with its interval and the interval's width."""
    return f"{found['mean']:.5f} [{found['low']:.5f}, {found['high']:.5f}], width {found['width']:.5f}"


def _how(arguments: OpeSettings) -> dict[str, Any]:
    return {"seed": arguments.seed, "resamples": arguments.resamples, "level": arguments.level}
