"""`windlass data bandit`: the Open Bandit sample as a feedback log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data.feedback import write_feedback
from data.feedback_reading import FeedbackChecks, FeedbackFault, find_faults
from data.open_bandit import Campaign, LoggingPolicy, open_bandit
from data.settings import Settings


class BanditCommand(Settings):
    """Arguments of `windlass data bandit`."""

    out: Path
    """Folder of the feedback log; days that it holds already are refused."""
    path: Path | None = None
    """Folder with bandit.parquet, or like obp/dataset/obd; may be left out where the obp wheel is installed."""
    campaign: Campaign = Campaign.ALL
    """all (80 items), men (34) or women (46)."""
    policy: LoggingPolicy = LoggingPolicy.RANDOM
    """random, or bts (Bernoulli Thompson sampling)."""


def bandit_command(
    arguments: Annotated[BanditCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Write real exposures, clicks and propensities of a policy of others as a feedback log without histories."""
    bandit = open_bandit(arguments.path, arguments.campaign, arguments.policy)
    fault_N = find_faults(bandit.log.table, FeedbackChecks(n_items=bandit.n_items))
    days = write_feedback(arguments.out, bandit.log.table)
    anchors = bandit.log.anchors()
    usable_N = fault_N == ""
    weight_N = 1 / (np.exp(anchors.logp0_N[usable_N].astype(np.float64)) * bandit.n_items)
    counts = {fault.value: int((fault_N == fault.value).sum()) for fault in FeedbackFault}
    answer = {
        "path": str(arguments.out),
        "rows": len(bandit.log),
        "days": days,
        "responses": int(anchors.response_N[usable_N].sum()),
        "n_items": bandit.n_items,
        "catalogue_digest": bandit.catalogue_digest,
        "policy_version": f"open-bandit-{arguments.policy}",
        "campaign": arguments.campaign.value,
        "counts": counts,
        "mean_weight": float(weight_N.mean()),
        "largest_weight": float(weight_N.max()),
    }
    print(
        f"{answer['path']}: {answer['rows']:,} exposures of {bandit.n_items} items on {len(days)} days, "
        f"{answer['responses']:,} clicks; weights against a uniform policy: mean {answer['mean_weight']:.3g} "
        f"(1 in expectation), largest {answer['largest_weight']:.3g}"
    )
    for reason, count in counts.items():
        if count:
            print(f"  {reason.replace('_', ' ')}: {count:,}")
    return answer
