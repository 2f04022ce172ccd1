"""Requests of a feedback log as training rows of `sft` and `rl` jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data import ragged
from data.catalogue import Catalogue
from data.dataset import Samples, Sequences
from data.errors import RequestError
from data.feedback import Anchors
from data.feedback_reading import FeedbackChecks, read_feedback
from data.records import NO_ITEM
from trainer.anchor import Anchor, Snips
from trainer.jobs import RlJob, SftJob
from trainer.policy_data import PolicyData


class LoggedRows(NamedTuple):
    """Training rows of a feedback log."""

    samples: Samples
    """A row per request; its target is the exposed item where there was a response."""
    anchors: Anchors
    """Exposures by row."""
    left_out: dict[str, int]
    """Rows that cannot be used, by reason."""
    kept: dict[str, int]
    """Rows among the samples that something sets apart (`data.feedback.KeptRow`)."""

    @property
    def told(self) -> str:
        """One line for the person who watches."""
        kept = "".join(f", {told}" for told in _told(self.kept))
        return f"feedback: {len(self.samples):,} rows{kept}; left out: {', '.join(_told(self.left_out)) or 'none'}"

    def record(self) -> dict[str, Any]:
        """What a summary keeps."""
        return {"rows": len(self.samples), "left_out": self.left_out, "kept": self.kept}


def _told(counts: Mapping[str, int]) -> list[str]:
    return [f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items()]


def responded(logged: LoggedRows) -> Samples:
    """The rows with a response.

    Raises:
        RequestError: there are none.
    """
    chosen = np.flatnonzero(logged.samples.target_N != NO_ITEM)
    if not len(chosen):
        raise RequestError("feedback", f"no response in {len(logged.samples)} rows", "a log with responses for sft")
    return logged.samples.take(chosen)


def response_sequences(logged: LoggedRows) -> Sequences:
    """A sequence per row with a response: its history as context and the exposed item as the only target.

    Raises:
        RequestError: no row has a response.
    """
    rows = responded(logged)
    length_N = rows.end_N - rows.start_N
    end_N = np.cumsum(length_N + 1)
    values = np.empty(int(end_N[-1]), np.int32)
    values[end_N - 1] = rows.target_N
    context = np.ones(len(values), np.bool_)
    context[end_N - 1] = False
    values[context] = rows.values[ragged.positions(rows.start_N, length_N)]
    return Sequences(
        values=values, start_S=end_N - length_N - 1, end_S=end_N, loss_from_S=length_N, user_id_S=rows.user_id_N
    )


def logged_rows(job: SftJob | RlJob, data: PolicyData) -> LoggedRows:
    """The requests of the log as training rows, and their exposures by row; without a response there is no target.

    Raises:
        RequestError: a log that cannot be read or used, or exposures without propensities where those are asked for.
    """
    assert job.feedback is not None
    checks = feedback_checks(job, data.catalogue)
    log = read_feedback(job.feedback, checks)
    samples, anchors = log.samples(), log.anchors()
    target_N = np.where(anchors.response_N > 0, samples.target_N, NO_ITEM).astype(np.int32)
    left_out = {reason: count for reason, count in log.counts.items() if count}
    if log.later_items:
        left_out["later_items"] = log.later_items
    kept = {reason: count for reason, count in log.kept.items() if count}
    return LoggedRows(dataclasses.replace(samples, target_N=target_N), anchors, left_out, kept)


def feedback_checks(job: SftJob | RlJob, catalogue: Catalogue) -> FeedbackChecks:
    """What the rows of a log must be for a job that trains a model of this catalogue.

    Items that were retired since are of use as anchors alone, which need not be generated.
    """
    anchor = job.objective.anchor if isinstance(job, RlJob) else Anchor()
    # Retiring items changes the digest; the log is most often older than the last retirement.
    whole = dataclasses.replace(catalogue, active=np.ones_like(catalogue.active))
    return FeedbackChecks(
        n_items=catalogue.n_items,
        active_I=catalogue.active,
        keep_retired=anchor.is_member,
        catalogues=frozenset({catalogue.digest, whole.digest, *job.feedback_catalogues}),
        propensities=anchor.is_member and anchor.snips is not Snips.NONE,
    )
