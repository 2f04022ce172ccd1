"""Contract: the Open Bandit sample becomes a log whose rows pass the checks; propensities and clicks are the source's;
the Parquet sample and the tables of the wheel give the same rows; what is not the sample is refused.

Not checked here: estimates from it; the sample has few clicks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from data.errors import RequestError
from data.feedback import write_feedback
from data.feedback_reading import FeedbackChecks, find_faults, read_feedback
from data.open_bandit import ITEMS, Campaign, LoggingPolicy, open_bandit
from tests.requirements import SHARED_DATA, require

SAMPLE = SHARED_DATA / "open_bandit_sample"


def tiny(propensity: list[float]) -> pa.Table:
    rows = len(propensity)
    columns = {
        "timestamp": pa.array([1_574_553_634_762_830 + 10**6 * row for row in range(rows)]),
        "position": pa.array([1, 2, 3][:rows]),
        "action": pa.array([5, 0, 33][:rows]),
        "click": pa.array([0, 1, 0][:rows]),
        "propensity": pa.array(propensity),
    }
    columns |= {f"user_feature_{n}": pa.array(["b", "a", "b"][:rows]) for n in range(4)}
    return pa.table(columns)


def as_sample(table: pa.Table) -> pa.Table:
    for name, value in (("campaign", "men"), ("policy", "bts")):
        table = table.append_column(name, pa.array([value] * len(table)).dictionary_encode())
    return table


def test_both_layouts_give_the_same_rows(tmp_path: Path) -> None:
    content = tiny([0.5, 1.0, 0.25])
    pq.write_table(as_sample(content), tmp_path / "bandit.parquet")
    wheel = tmp_path / "wheel" / "bts" / "men"
    wheel.mkdir(parents=True)
    times = content["timestamp"].cast(pa.timestamp("us", tz="UTC"))
    names = {"action": "item_id", "propensity": "propensity_score"}
    renamed = content.set_column(0, "timestamp", times).rename_columns([names.get(n, n) for n in content.column_names])
    csv.write_csv(renamed, wheel / "men.csv")
    one = open_bandit(tmp_path, Campaign.MEN, LoggingPolicy.BTS)
    other = open_bandit(tmp_path / "wheel", Campaign.MEN, LoggingPolicy.BTS)
    assert one.log.table.equals(other.log.table)
    anchors = one.log.anchors()
    assert anchors.item_N.tolist() == [5, 0, 33]
    assert anchors.response_N.tolist() == [0, 1, 0]
    np.testing.assert_allclose(np.exp(anchors.logp0_N), [0.5, 1, 0.25])
    assert one.log.table["user_id"].to_pylist() == [1, 0, 1]
    assert one.log.table["timestamp"].to_pylist() == [1_574_553_634, 1_574_553_635, 1_574_553_636]
    assert one.log.table["need"].to_pylist() == ["position 1", "position 2", "position 3"]
    assert one.log.table["history"].to_pylist() == [[], [], []]


def test_impossible_propensities_are_found_by_the_checks(tmp_path: Path) -> None:
    pq.write_table(as_sample(tiny([0.0, 1.5, float("nan")])), tmp_path / "bandit.parquet")
    log = open_bandit(tmp_path, Campaign.MEN, LoggingPolicy.BTS).log
    faults = ["zero_propensity", "positive_log_propensity", "missing_propensity"]
    assert find_faults(log.table, FeedbackChecks(n_items=34)).tolist() == faults


def test_what_is_not_the_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"neither bandit\.parquet"):
        open_bandit(tmp_path, Campaign.ALL, LoggingPolicy.RANDOM)
    pq.write_table(as_sample(tiny([0.5])), tmp_path / "bandit.parquet")
    with pytest.raises(RequestError, match="no rows of all/random"):
        open_bandit(tmp_path, Campaign.ALL, LoggingPolicy.RANDOM)
    pq.write_table(as_sample(tiny([0.5])).drop_columns(["click"]), tmp_path / "bandit.parquet")
    with pytest.raises(RequestError, match="column click: no such column"):
        open_bandit(tmp_path, Campaign.MEN, LoggingPolicy.BTS)
    pq.write_table(
        as_sample(tiny([0.5]).set_column(3, "click", pa.array([None], pa.int8()))), tmp_path / "bandit.parquet"
    )
    with pytest.raises(RequestError, match="column click: 1 nulls"):
        open_bandit(tmp_path, Campaign.MEN, LoggingPolicy.BTS)


@pytest.mark.parametrize("campaign", list(Campaign))
def test_the_real_sample(campaign: Campaign, tmp_path: Path) -> None:
    """The figures of the sample's README: number of items, uniform propensities of the random policy, mean weights."""
    require("shared-data")
    n_items = ITEMS[campaign]
    for policy in LoggingPolicy:
        bandit = open_bandit(SAMPLE, campaign, policy)
        write_feedback(tmp_path / policy, bandit.log.table)
        checks = FeedbackChecks(n_items=n_items, catalogues=frozenset({bandit.catalogue_digest}), max_bad_share=0.0)
        log = read_feedback(tmp_path / policy, checks)
        assert len(log) == 10_000
        anchors = log.anchors()
        assert len(np.unique(anchors.item_N)) == n_items
        assert 38 <= anchors.response_N.sum() <= 69
        weight_N = np.exp(-anchors.logp0_N.astype(np.float64)) / n_items
        if policy is LoggingPolicy.RANDOM:
            np.testing.assert_allclose(weight_N, 1, rtol=1e-5)
        elif campaign is Campaign.WOMEN:
            assert weight_N.mean() == pytest.approx(3.1, abs=0.1)
