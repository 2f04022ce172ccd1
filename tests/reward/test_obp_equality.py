"""Contract: IPS, SNIPS and the doubly robust estimate equal those of obp (Open Bandit Pipeline) on its own sample.

Real exposures and propensities of both logging policies in every campaign, an evaluated policy that depends on the
context, a reward model by item. Not checked: clipped weights, which obp 0.4.1 does not have, and the intervals (obp
resamples rows, we resample users); `tests.reward.test_off_policy` does.
"""

from __future__ import annotations

import numpy as np
import pytest

from data.open_bandit import Campaign, LoggingPolicy, open_bandit
from reward.off_policy import DoubleArray, Estimator, LoggedExposures, policy_value
from tests.requirements import SHARED_DATA, require

POSITIONS = 3


@pytest.mark.parametrize("policy", list(LoggingPolicy))
@pytest.mark.parametrize("campaign", list(Campaign))
def test_estimates_equal_those_of_obp(campaign: Campaign, policy: LoggingPolicy) -> None:
    require("obp")
    require("shared-data")
    from obp.ope import DoublyRobust, InverseProbabilityWeighting, SelfNormalizedInverseProbabilityWeighting

    bandit = open_bandit(SHARED_DATA / "open_bandit_sample", campaign, policy)
    table, anchors = bandit.log.table, bandit.log.anchors()
    rows, items = len(bandit.log), bandit.n_items
    need = [int(text.removeprefix("position ")) for text in table["need"].to_pylist()]
    position_N = np.unique(need, return_inverse=True)[1]
    usable = np.flatnonzero(np.isfinite(anchors.logp0_N))
    random = np.random.default_rng(7)
    segment_N = table["user_id"].to_numpy()
    target_SA = softmax(random.normal(0, 1.0, (int(segment_N.max()) + 1, items)))
    target_NA = target_SA[segment_N]
    model_A = random.uniform(0.0, 0.1, items)
    every = np.arange(rows)
    ours = policy_value(
        LoggedExposures(
            response_N=anchors.response_N[usable].astype(np.float64),
            logp_N=np.log(target_NA[every, anchors.item_N])[usable],
            logp0_N=anchors.logp0_N[usable].astype(np.float64),
            model_shown_N=model_A[anchors.item_N][usable],
            model_policy_N=(target_NA @ model_A)[usable],
            user_N=segment_N[usable],
        ),
        resamples=10,
    )
    logged = {
        "reward": anchors.response_N[usable].astype(np.float64),
        "action": anchors.item_N[usable].astype(np.int64),
        "position": position_N[usable],
        "pscore": np.exp(anchors.logp0_N[usable].astype(np.float64)),
        "action_dist": np.repeat(target_NA[usable][:, :, None], POSITIONS, axis=2),
    }
    model_NAK = np.broadcast_to(model_A[None, :, None], (len(usable), items, POSITIONS)).copy()
    theirs = {
        Estimator.IPS: InverseProbabilityWeighting().estimate_policy_value(**logged),
        Estimator.SNIPS: SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**logged),
        Estimator.DR: DoublyRobust().estimate_policy_value(**logged, estimated_rewards_by_reg_model=model_NAK),
    }
    for estimator, value in theirs.items():
        assert ours.estimates[estimator].mean == pytest.approx(value, rel=1e-10), estimator


def softmax(logit_SA: DoubleArray) -> DoubleArray:
    """Rows that sum to one."""
    value_SA = np.exp(logit_SA)
    probability_SA: DoubleArray = value_SA / value_SA.sum(1, keepdims=True)
    return probability_SA
