"""Contract: kept shares are as asked for and grow with popularity; what is kept is a subsequence, seeded, with the same
targets; a job without bias is the job it was, one with bias trains on less and is another job.

Not checked here: what a biased reward does to a policy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import Dataset
from data.errors import RequestError
from tests.data.tiny import import_events, sequences
from trainer.jobs import RankerJob
from trainer.popularity_bias import item_counts, keep_probabilities, popularity_subsample
from trainer.ranker_settings import RankerBiasSettings
from trainer.ranker_training import train_ranker


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=30).filter(any),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)
def test_the_expected_share_is_kept_and_popular_items_keep_more(
    counts: list[int], keep: float, exponent: float
) -> None:
    count_I = np.array(counts)
    keep_I = keep_probabilities(count_I, RankerBiasSettings(keep=keep, exponent=exponent))
    assert (keep_I * count_I).sum() == pytest.approx(keep * count_I.sum())
    assert ((keep_I >= 0) & (keep_I <= 1)).all()
    there = count_I > 0
    order = np.argsort(count_I[there])
    assert (np.diff(keep_I[there][order]) >= -1e-12).all()
    # Below 1 the probabilities are proportional to the power of the count.
    scale = keep_I[there & (keep_I < 1)] / count_I[there & (keep_I < 1)] ** exponent
    np.testing.assert_allclose(scale, scale[0] if len(scale) else 0, rtol=1e-6)
    if exponent == 0:
        np.testing.assert_allclose(keep_I[there], keep)


EVENTS = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=12), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.floats(0.2, 1), st.integers(0, 99), st.data())
def test_what_is_kept_is_a_subsequence_with_its_targets(
    events: list[list[int]], keep: float, seed: int, data: st.DataObject
) -> None:
    # Numbered events, so that each can be told apart, of items that repeat by taking them modulo 6.
    numbered, number = [], 0
    for items in events:
        numbered.append(list(range(number, number + len(items))))
        number += len(items)
    loss_from = [data.draw(st.integers(0, len(items) - 1)) for items in events]
    bias = RankerBiasSettings(keep=keep)
    whole = sequences(numbered, loss_from)
    try:
        found = popularity_subsample(whole, number, bias, seed=seed)
    except RequestError:
        return
    again = popularity_subsample(whole, number, bias, seed=seed)
    assert found.values.tolist() == again.values.tolist()
    for s in range(len(found)):
        user = int(found.user_id_S[s])
        kept = found.values[found.start_S[s] : found.end_S[s]].tolist()
        assert len(kept) >= 2
        assert [event for event in numbered[user] if event in kept] == kept
        first = int(found.loss_from_S[s])
        assert first < len(kept)
        context = sum(event < numbered[user][loss_from[user]] for event in kept)
        assert first == max(context, min(loss_from[user], 2))


def test_the_empirical_share_is_near_the_expected_one() -> None:
    random = np.random.default_rng(0)
    events = (random.zipf(1.5, 20_000) % 200).reshape(-1, 20).tolist()
    whole = sequences(events, [1] * len(events))
    count_I = item_counts(whole, 200)
    bias = RankerBiasSettings(keep=0.3, exponent=0.5)
    kept_I = item_counts(popularity_subsample(whole, 200, bias, seed=1), 200)
    assert kept_I.sum() / count_I.sum() == pytest.approx(0.3, abs=0.02)
    head = np.argsort(-count_I)[:10]
    assert kept_I[head].sum() / count_I[head].sum() > 0.33
    with pytest.raises(RequestError, match="no sequence keeps two"):
        popularity_subsample(sequences([[0, 1], [2, 3]], [1, 1]), 4, RankerBiasSettings(keep=1e-9), seed=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    random = np.random.default_rng(0)
    events = [(u, f"item{int(random.integers(10)) ** 2 // 9}", 1000 * t + u) for u in range(40) for t in range(15)]
    return import_events(tmp_path_factory.mktemp("biased"), events)


def test_a_biased_job_is_another_job_and_trains_on_less(dataset: Dataset, tmp_path: Path) -> None:
    def job(kind: str, **bias: float) -> RankerJob:
        content = {
            "data": {"dataset": "d", "history": 8},
            "ranker": {"kind": kind, "bias": bias},
            "limits": {"max_steps": 3},
        }
        return RankerJob.model_validate(content | {"evaluation": {"rows": 20, "k": [1, 5], "metric": "ndcg@5"}})

    for kind in ("popularity", "cooccurrence", "sasrec"):
        plain = train_ranker(job(kind), dataset, tmp_path / kind / "plain")
        same = train_ranker(job(kind, exponent=2.0), dataset, tmp_path / kind / "plain")
        assert same.digest == plain.digest
        biased = train_ranker(job(kind, keep=0.4), dataset, tmp_path / kind / "biased")
        assert biased.digest != plain.digest
        with pytest.raises(RequestError, match="another job"):
            train_ranker(job(kind, keep=0.4), dataset, tmp_path / kind / "plain")
