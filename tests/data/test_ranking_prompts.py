"""Contract of `data.ranking_prompts`, `data.list_samples` and `data.candidates`: blocks ask for every event once and
never for one of another split; a prompt is what the module says, its candidates hold the next events and otherwise
permitted items, keyed by seed and sample; gains stand where the items are; what is left out is counted; sets that no
list can be made of are refused by name.

Not checked: what a model makes of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data.candidates import CandidateFiller, check_candidates
from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.importing import ImportRules, import_source
from data.list_samples import ListSamples, list_samples
from data.needs import GainRows, ItemFacts, NeedSettings, instruction_words, load_needs
from data.ranking_prompts import ListDataSettings, RankingCount, RankingPromptBuilder
from data.records import NO_ITEM, IntArray
from data.sources import TimeUnit
from data.split import Given
from data.tabular import ColumnNames, table
from data.vocabulary import list_words

ITEMS, BLOCK = 24, 3
WORDS = ("interest", "niche", "late")


def no_gain(rows: GainRows, facts: ItemFacts) -> np.ndarray:
    return np.zeros(len(rows.item_N))


def even_users(rows: GainRows, facts: ItemFacts) -> np.ndarray:
    return np.where(rows.user_N % 2 == 0, rows.rating_N, 0.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """12 users, up to 14 events each at shared times, ratings 1 to 5, some missing, some items repeated."""
    folder = tmp_path_factory.mktemp("lists")
    rng = np.random.default_rng(0)
    size = rng.integers(1, 15, 12)
    user = np.repeat(np.arange(12), size)
    item = rng.integers(0, ITEMS, size.sum())
    item[:ITEMS] = np.arange(ITEMS)
    time = np.concatenate([np.sort(rng.integers(0, 60, n)) for n in size])
    rating = [None if r == 0 else float(r) for r in rng.integers(0, 6, size.sum())]
    columns = {"user_id": user, "item_id": item, "timestamp": time, "rating": pa.array(rating, pa.float64())}
    pq.write_table(pa.table(columns), folder / "events.parquet")
    source = table(folder / "events.parquet", None, ColumnNames(), TimeUnit.SECONDS)
    return import_source(source, folder / "dataset", ImportRules(unknown_items="add", duplicates="keep"))


def catalogue_of(dataset: Dataset, words: tuple[str, ...] = WORDS) -> Catalogue:
    """Paths of one to three codes; items 0 and 1 share a path, item 2 is retired."""
    codes = [[item // 6, item % 6, 0][: 2 + item % 2] for item in range(dataset.n_items)]
    codes[1] = codes[0]
    active = np.arange(dataset.n_items) != 2
    return Catalogue.from_codes(codes, active=active).with_words(list_words(words))


def builder_of(
    dataset: Dataset,
    *needs: NeedSettings,
    retriever: Any = None,
    free_text: bool = False,
    limit: int = 64,
    **lists: Any,
) -> RankingPromptBuilder:
    needs = needs or (NeedSettings(name="interest"),)
    settings = ListDataSettings(**{"needs": needs, "candidates": 8, "positives": BLOCK, **lists})
    return RankingPromptBuilder(
        catalogue_of(dataset),
        dataset,
        settings,
        load_needs(settings.needs),
        history=4,
        exclude_seen=True,
        max_prompt_tokens=limit,
        free_text=free_text,
        seed=5,
        retriever=retriever,
    )


@pytest.mark.parametrize("block", [1, 3, 50])
def test_blocks_ask_for_every_event_of_a_split_once(dataset: Dataset, block: int) -> None:
    asked: list[int] = []
    for split in ("train", "valid", "test"):
        samples = list_samples(dataset, split, block)
        plain = dataset.samples(split)
        mine = [e for end, stop in zip(samples.end_N, samples.stop_N, strict=True) for e in range(end, stop)]
        assert sorted(mine) == sorted(plain.end_N.tolist())
        asked += mine
        size = samples.stop_N - samples.end_N
        assert ((size >= 1) & (size <= block)).all()
        assert (np.diff(samples.timestamp_N) >= 0).all()
        for row in range(len(samples)):
            events = slice(int(samples.start_N[row]), int(samples.stop_N[row]))
            assert (dataset.events.user_E[events] == samples.user_id_N[row]).all()
            assert samples.timestamp_N[row] == dataset.events.time_E[samples.end_N[row]]
    assert len(set(asked)) == len(asked)
    with pytest.raises(RequestError, match="split: dev"):
        list_samples(dataset, "dev", block)


def test_rows_without_next_events_are_refused(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "split", Given())
    with pytest.raises(RequestError, match="a given split; legal: interactions of users"):
        list_samples(dataset, "train", BLOCK)


def test_gains_below_zero_are_refused(dataset: Dataset) -> None:
    samples = list_samples(dataset, "train", BLOCK)
    negative = dataclasses.replace(samples, rating_E=-np.abs(np.nan_to_num(samples.rating_E, nan=1.0)) - 1)
    with pytest.raises(RequestError, match=r"need interest: gain -\d of user \d+, item \d+"):
        builder_of(dataset).build(negative)


def expected_positives(
    catalogue: Catalogue, samples: ListSamples, row: int, counts: dict[str, int]
) -> dict[int, float]:
    """Plain loop: items of the next events, with the rating of their first event."""
    seen = {int(catalogue.path_id[item]) for item in samples.item_E[samples.start_N[row] : samples.end_N[row]]}
    found: dict[int, float] = {}
    paths: set[int] = set()
    for event in range(int(samples.end_N[row]), int(samples.stop_N[row])):
        item = int(samples.item_E[event])
        path = int(catalogue.path_id[item])
        if not catalogue.active[item]:
            counts["positive_retired"] += 1
        elif path in seen and any(
            catalogue.active[i] and catalogue.path_id[i] == path
            for i in samples.item_E[samples.start_N[row] : samples.end_N[row]]
        ):
            counts["positive_seen"] += 1
        elif path in paths:
            counts["positive_repeated"] += 1
        else:
            paths.add(path)
            rating = float(samples.rating_E[event])
            found[item] = 1.0 if np.isnan(rating) else rating
    return found


@pytest.mark.parametrize("free_text", [False, True])
def test_prompts_against_a_plain_loop(dataset: Dataset, free_text: bool) -> None:
    builder = builder_of(dataset, free_text=free_text)
    catalogue = builder.catalogue
    samples = list_samples(dataset, "train", BLOCK)
    batch = builder.build(samples)
    counts = dict.fromkeys((count.value for count in RankingCount), 0)
    by_id = {prompt.prompt_id: prompt for prompt in batch.prompts}
    for row in range(len(samples)):
        wanted = expected_positives(catalogue, samples, row, counts)
        if not wanted:
            counts["no_positives"] += 1
            assert row not in by_id
            continue
        prompt = by_id.pop(row)
        assert prompt.candidates is not None
        assert prompt.gain_C is not None
        assert prompt.observed_C is not None
        candidates = prompt.candidates.tolist()
        gain = dict(zip(candidates, prompt.gain_C.tolist(), strict=True))
        assert {item: g for item, g in gain.items() if g} == pytest.approx(wanted)
        assert prompt.candidates[prompt.observed_C].tolist() == [item for item in candidates if item in wanted]
        history = samples.item_E[samples.start_N[row] : samples.end_N[row]]
        assert len(candidates) == 8
        assert len({catalogue.path_id[item] for item in candidates}) == 8
        assert not set(candidates) & {2, *history.tolist()}
        tokens = [1, *(t for item in history[-4:] for t in catalogue.tokens(item).tolist())]
        word = catalogue.vocabulary.word_token
        tokens += [word("<need:interest>"), word("<candidates>")]
        tokens += [t for item in candidates for t in catalogue.tokens(item).tolist()]
        assert prompt.token_ids.tolist() == tokens + ([] if free_text else [word("<list>")])
        assert prompt.history.tolist() == history[-4:].tolist()
        assert (prompt.need, prompt.user_id) == ("interest", samples.user_id_N[row])
        assert prompt.timestamp == samples.timestamp_N[row]
        assert (prompt.target, prompt.exclusions.tolist()) == (NO_ITEM, [])
    assert not by_id
    assert batch.counts == counts
    assert counts["no_positives"] + counts["positive_repeated"] + counts["positive_seen"] > 0


def test_candidates_depend_on_the_seed_and_the_sample_only(dataset: Dataset) -> None:
    needs = (NeedSettings(name="interest"), NeedSettings(name="niche"))
    builder = builder_of(dataset, *needs)
    samples = list_samples(dataset, "train", BLOCK)
    first, second = (builder.build(samples, [need]) for need in (0, 1))
    assert [p.need for p in first.prompts[:1] + second.prompts[:1]] == ["interest", "niche"]
    assert len({p.prompt_id for p in first.prompts + second.prompts}) == len(first) + len(second)
    other = {prompt.prompt_id // 2: prompt for prompt in second.prompts}
    for prompt in first.prompts:
        assert prompt.candidates is not None
        assert prompt.candidates.tolist() == other[prompt.prompt_id // 2].candidates.tolist()
        assert prompt.token_ids.tolist() != other[prompt.prompt_id // 2].token_ids.tolist()
    few = samples.take(np.array([4, 2]))
    again = {prompt.prompt_id: prompt for prompt in builder.build(few, [0]).prompts}
    for prompt in first.prompts:
        if prompt.prompt_id in again:
            assert prompt.candidates.tolist() == again.pop(prompt.prompt_id).candidates.tolist()
    assert not again
    places = [place for prompt in first.prompts for place in np.flatnonzero(prompt.observed_C)]
    assert set(places) == set(range(8))


def test_needs_take_turns_and_one_is_held_out(dataset: Dataset) -> None:
    needs = [
        NeedSettings(name="interest"),
        NeedSettings(name="late", gain="tests.data.test_ranking_prompts:even_users"),
    ]
    needs.insert(1, NeedSettings(name="niche"))
    samples = list_samples(dataset, "train", BLOCK)
    batch = builder_of(dataset, *needs, held_out="niche").build(samples)
    assert {prompt.need for prompt in batch.prompts} == {"interest", "late"}
    assert all(prompt.need == ("interest", "late")[prompt.prompt_id // 3 % 2] for prompt in batch.prompts)
    # Users with odd numbers have no gain for "late"; those prompts are dropped and counted.
    odd = [n for n, user in zip(samples.sample_id_N, samples.user_id_N, strict=True) if n % 2 == 1 and user % 2 == 1]
    assert 0 < batch.counts["no_gain"] <= len(odd)
    assert len(batch) + batch.counts["no_gain"] + batch.counts["no_positives"] == len(samples)


def test_a_need_without_gains_is_refused(dataset: Dataset) -> None:
    builder = builder_of(dataset, NeedSettings(name="late", gain="tests.data.test_ranking_prompts:no_gain"))
    with pytest.raises(RequestError, match=r"need late: none of \d+ prompts has a candidate with a gain"):
        builder.build(list_samples(dataset, "train", BLOCK))


def test_equal_gains_are_counted(dataset: Dataset) -> None:
    builder = builder_of(dataset, candidates=2, positives=1)
    samples = list_samples(dataset, "train", 2)
    rating_E = np.ones_like(samples.rating_E)
    batch = builder.build(dataclasses.replace(samples, rating_E=rating_E))
    both = sum(
        len(expected_positives(builder.catalogue, samples, row, dict.fromkeys(RankingCount, 0))) == 2
        for row in range(len(samples))
    )
    assert batch.counts["equal_gains"] == both > 0


def test_retrieved_candidates_come_first(dataset: Dataset) -> None:
    ranked = np.array([2, 9, 10, 11, 12, NO_ITEM], np.int32)
    calls: list[tuple[int, int]] = []

    def retriever(histories: Any, number: int) -> IntArray:
        calls.append((len(histories), number))
        return np.tile(ranked, (len(histories), 1))

    builder = builder_of(dataset, source="retrieved", retriever=retriever)
    samples = list_samples(dataset, "train", BLOCK)
    batch = builder.build(samples)
    assert calls[0][0] == len(samples)
    short = 0
    for prompt in batch.prompts:
        assert prompt.candidates is not None
        row = prompt.prompt_id
        history = set(samples.item_E[samples.start_N[row] : samples.end_N[row]].tolist())
        positives = set(prompt.candidates[prompt.observed_C].tolist())
        expected = [item for item in (9, 10, 11, 12) if item not in history | positives][: 8 - len(positives)]
        assert set(expected) <= set(prompt.candidates.tolist())
        short += 8 - len(positives) - len(expected)
    assert 0 < short <= batch.counts["retrieved_few"]
    with pytest.raises(RequestError, match="a ranker to retrieve with"):
        builder_of(dataset, source="retrieved")


def test_long_prompts_lose_their_oldest_items(dataset: Dataset) -> None:
    least = 4 + 9 * 3
    samples = list_samples(dataset, "train", BLOCK)
    batch = builder_of(dataset, limit=least).build(samples)
    whole = builder_of(dataset).build(samples)
    assert batch.counts["shortened"] > 0
    for short, full in zip(batch.prompts, whole.prompts, strict=True):
        assert len(short.token_ids) <= least
        assert full.history.tolist()[len(full.history) - len(short.history) :] == short.history.tolist()
    with pytest.raises(RequestError, match=f"max_prompt_tokens: {least - 1}; legal: at least {least}"):
        builder_of(dataset, limit=least - 1)


def test_a_small_catalogue_is_counted(dataset: Dataset) -> None:
    batch = builder_of(dataset, candidates=22, limit=100).build(list_samples(dataset, "train", BLOCK))
    assert batch.counts["few_items"] > 0


def test_requests_without_gains(dataset: Dataset) -> None:
    builder = builder_of(dataset)
    prompt = builder.prompt(np.array([3, 4], np.int32), np.array([9, 7], np.int32), 0)
    assert (prompt.need, prompt.gain_C) == ("interest", None)
    with pytest.raises(RequestError, match="prompt 0: candidates: 0 items"):
        builder.prompt(np.array([3], np.int32), np.array([], np.int32), 0)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "0 items; legal: 2 or more different items of the catalogue, at most 4"),
        ([3], "1 items"),
        ([3, 4, 5, 6, 7], "5 items"),
        ([3, 99], "unknown item 99; legal: 0 to 23"),
        ([-1, 3], "unknown item -1"),
        ([3, 2], "retired item 2"),
        ([3, 4, 3], "item 3 twice"),
        ([5, 1, 0], "item 1 and item 0, which has the same path"),
    ],
)
def test_sets_that_no_list_can_be_made_of_are_refused(dataset: Dataset, items: list[int], message: str) -> None:
    path_id = catalogue_of(dataset).active_path_id
    with pytest.raises(RequestError, match=f"request 7: candidates: {message}"):
        check_candidates("request 7", np.array(items, np.int32), path_id, least=2, most=4)


def test_fillers_draw_every_free_item_alike(dataset: Dataset) -> None:
    filler = CandidateFiller(catalogue_of(dataset))
    wanted, banned = np.array([1], np.int32), np.array([5, 6], np.int32)
    for size in (4, 20):
        drawn = [filler.fill(wanted, size, banned, None, (3, row)).item_C for row in range(600)]
        count = np.bincount(np.concatenate(drawn), minlength=ITEMS)
        # Item 0 has the path of item 1, item 2 is retired: 19 are free.
        assert (count[[0, 2, 5, 6]] == 0).all()
        assert count[1] == 600
        free = np.delete(count, [0, 1, 2, 5, 6])
        expected = 600 * (size - 1) / 19
        assert (abs(free - expected) < 5 * np.sqrt(expected) + 1e-9).all()
    assert len(filler.fill(wanted, 30, banned, None, (3,)).item_C) == 20


def test_settings_that_contradict_themselves_are_refused() -> None:
    for wrong in (
        {"candidates": 5, "positives": 5},
        {"held_out": "niche"},
        {"held_out": "interest"},
    ):
        with pytest.raises(ValidationError):
            ListDataSettings(**wrong)


def test_the_vocabulary_has_to_know_the_words(dataset: Dataset) -> None:
    with pytest.raises(RequestError, match="word: <need:quiet>"):
        builder_of(dataset, NeedSettings(name="quiet", gain="tests.data.test_ranking_prompts:no_gain"))
    assert instruction_words(load_needs([NeedSettings(name="interest")])) == ("interest",)
