"""Contract: a feedback log becomes training rows whose ids are the rows of its exposures; a log of other items, and
beams where importance weights are asked for, are refused; a log written before a retirement is not, and rows of a
retired item are used where it can be an anchor. Single rows that
cannot be used are left out and counted by reason; a log of nothing else is refused.

Not checked here: running the jobs (tests/launch/test_whole_job.py), the reader's other checks (tests/data).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data.errors import RequestError
from data.feed import sequence_windows
from data.feedback import SCHEMA, FeedbackLog, PropensityKind, single_item_log, write_feedback
from data.records import NO_ITEM
from tests.small_world import ITEMS, recipe, write_dataset
from trainer.jobs import RlJob, SftJob
from trainer.logged_rows import logged_rows, response_sequences
from trainer.policy_data import PolicyData

ROWS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("world")).path


def job(dataset: Path, log: Path, anchor: dict[str, Any] | None = None, **sections: Any) -> RlJob:
    anchored = anchor is not None
    content = recipe(
        dataset,
        "rl",
        rollout={"engine": "reference", "decode": "sample"},
        reward={"item_match": 0.0 if anchored else 1.0, "rank_penalty": 0.0, "feedback": float(anchored)},
        objective={"anchor": anchor or {}},
        feedback=str(log),
        **sections,
    )
    return RlJob.model_validate(content)


def plain_log(digest: str, *, decode: str = "sample", rows: int = ROWS) -> FeedbackLog:
    kind = PropensityKind.NONE if decode == "beam" else PropensityKind.SAMPLE
    return single_item_log(
        request_id=[f"r{row}" for row in range(rows)],
        user_id_N=np.arange(rows, dtype=np.int32),
        timestamp_N=np.arange(rows, dtype=np.int64),
        history=[np.array([row], np.int32) for row in range(rows)],
        exposed_N=np.arange(rows, dtype=np.int32) + 20,
        response_N=(np.arange(rows) % 3 == 0).astype(np.float32),
        logp0_N=np.full(rows, -2.0, np.float32),
        propensity_kind=kind,
        policy_version="v0",
        decode=[decode] * rows,
        temperature=1.0,
        catalogue_digest=digest,
    )


def write_log(folder: Path, digest: str, *, decode: str = "sample") -> Path:
    write_feedback(folder, plain_log(digest, decode=decode).table)
    return folder


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_feedback(folder, pa.Table.from_pylist(rows, schema=SCHEMA))
    return folder


def test_rows_of_a_log_are_training_rows_with_a_target_where_there_was_a_response(
    dataset: Path, tmp_path: Path
) -> None:
    data = PolicyData.open(job(dataset, tmp_path))
    log = write_log(tmp_path / "log", data.catalogue.digest)
    samples, anchors, left_out, kept = logged_rows(job(dataset, log, {"mode": "append"}), data)
    assert left_out == kept == {}
    responded_N = np.arange(ROWS) % 3 == 0
    assert samples.sample_id_N.tolist() == list(range(ROWS))
    assert anchors.item_N.tolist() == list(range(20, 20 + ROWS))
    assert samples.target_N.tolist() == np.where(responded_N, anchors.item_N, NO_ITEM).tolist()
    other = dataclasses.replace(anchors, response_N=1 - anchors.response_N)
    assert anchors.digest == dataclasses.replace(anchors).digest != other.digest


def test_responses_of_a_log_are_the_only_targets_of_supervised_training(dataset: Path, tmp_path: Path) -> None:
    data = PolicyData.open(job(dataset, tmp_path))
    table = plain_log(data.catalogue.digest, decode="beam").table
    history = [[], [1, 2, 3], [4], [5, 6], *[[7]] * (ROWS - 4)]
    place = table.column_names.index("history")
    field = SCHEMA.field("history")
    write_feedback(tmp_path / "log", table.set_column(place, field, pa.array(history, field.type)))
    sft = SftJob.model_validate(recipe(dataset, "sft", feedback=str(tmp_path / "log")))
    logged = logged_rows(sft, data)
    sequences = response_sequences(logged)
    rows = [row for row in range(ROWS) if row % 3 == 0]
    bounds = zip(sequences.start_S.tolist(), sequences.end_S.tolist(), strict=True)
    assert [sequences.values[start:end].tolist() for start, end in bounds] == [
        [*history[row], 20 + row] for row in rows
    ]
    assert sequences.loss_from_S.tolist() == [len(history[row]) for row in rows]
    windows = sequence_windows(sequences, data.catalogue, 6, 0, 0)
    targets = sorted(tokens[mask].tolist() for tokens, mask in windows)
    assert targets == sorted(data.catalogue.tokens(20 + row).tolist() for row in rows)
    nobody = dataclasses.replace(logged.samples, target_N=np.full(ROWS, NO_ITEM, np.int32))
    with pytest.raises(RequestError, match="no response in 12 rows"):
        response_sequences(logged._replace(samples=nobody))


def test_a_log_of_other_items_is_refused_and_one_from_before_a_retirement_is_not(dataset: Path, tmp_path: Path) -> None:
    data = PolicyData.open(job(dataset, tmp_path))
    log = write_log(tmp_path / "log", data.catalogue.digest)
    retired = dataclasses.replace(data, catalogue=data.catalogue.retire([20]))
    kept = logged_rows(job(dataset, log, {"mode": "append"}), retired)
    assert len(kept.samples) == ROWS
    assert (kept.left_out, kept.kept) == ({}, {"retired_item_kept": 1})
    assert kept.told == "feedback: 12 rows, 1 retired item kept; left out: none"
    assert kept.record() == {"rows": ROWS, "left_out": {}, "kept": {"retired_item_kept": 1}}
    foreign = write_log(tmp_path / "foreign", "another")
    with pytest.raises(RequestError, match=r"12 of 12 rows are bad \(12 foreign_catalogue"):
        logged_rows(job(dataset, foreign, {"mode": "append"}), data)
    named = job(dataset, foreign, {"mode": "append"}, feedback_catalogues=["another"])
    assert len(logged_rows(named, data).samples) == ROWS


def test_rows_of_retired_items_are_of_use_as_anchors_alone(dataset: Path, tmp_path: Path) -> None:
    data = PolicyData.open(job(dataset, tmp_path))
    log = write_log(tmp_path / "log", data.catalogue.digest)
    data = dataclasses.replace(data, catalogue=data.catalogue.retire([20]))
    sft = SftJob.model_validate(recipe(dataset, "sft", feedback=str(log)))
    for other in (sft, job(dataset, log), job(dataset, log, {"mode": "feedback_only"})):
        left = logged_rows(other, data)
        assert (left.left_out, left.kept) == ({"retired_item": 1}, {})
        assert left.told == "feedback: 11 rows; left out: 1 retired item"
        assert 20 not in left.anchors.item_N
    anchored = logged_rows(job(dataset, log, {"mode": "replace_last"}), data)
    assert (anchored.anchors.item_N[0], anchored.samples.target_N[0]) == (20, 20)


def test_beams_are_refused_only_where_the_anchor_is_weighed(dataset: Path, tmp_path: Path) -> None:
    data = PolicyData.open(job(dataset, tmp_path))
    log = write_log(tmp_path / "log", data.catalogue.digest, decode="beam")
    with pytest.raises(RequestError, match="12 beam_exposure"):
        logged_rows(job(dataset, log, {"mode": "append"}), data)
    for anchor in (None, {"mode": "feedback_only"}, {"mode": "append", "snips": "none"}):
        assert len(logged_rows(job(dataset, log, anchor), data).samples) == ROWS


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("logp0", [-np.inf], "zero_propensity"),
        ("logp0", [0.1], "positive_log_propensity"),
        ("logp0", [None], "missing_propensity"),
        ("policy_version", None, "missing_policy_version"),
        ("response", [1.5], "bad_response"),
        ("response", [np.nan], "bad_response"),
        ("exposed", [ITEMS], "unknown_item"),
        ("decode", "beam", "beam_exposure"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(
    dataset: Path, tmp_path: Path, column: str, value: Any, fault: str
) -> None:
    data = PolicyData.open(job(dataset, tmp_path))
    rows = plain_log(data.catalogue.digest, rows=25).table.to_pylist()
    bad = write(tmp_path / "one", [*rows[:7], {**rows[7], column: value}, *rows[8:]])
    kept = logged_rows(job(dataset, bad, {"mode": "append"}), data)
    assert kept.left_out == {fault: 1}
    assert kept.anchors.item_N.tolist() == [item for item in range(20, 45) if item != 27]
    assert kept.samples.sample_id_N.tolist() == list(range(24))
    all_bad = write(tmp_path / "all", [{**row, column: value} for row in rows])
    with pytest.raises(RequestError, match=f"25 {fault}"):
        logged_rows(job(dataset, all_bad, {"mode": "append"}), data)
