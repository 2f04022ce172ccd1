"""Evaluation of a saved model of ranked lists, need by need, beside orders of the same candidates.

Every need that the model was made for is measured on the same seeded sample of a split, with all gains. `seen` are the
needs that its training took, `unseen` the one that was held out; both are means over needs, so a need with few prompts
counts like any other. Suffix: `_N` prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.ranking_prompts import RankingPromptBatch
from data.records import Decode, DecodeSpec, IntArray, LongArray
from data.settings_data import PromptSettings
from data.text_prompts import TextPromptBuilder
from data.text_settings import ItemForm
from reward.list_metrics import Floats
from reward.ranker import Ranker
from rollout.fleet import RolloutFleet
from rollout.settings import RolloutSettings
from trainer.candidate_orders import candidate_orders
from trainer.checkpoint_evaluation import check_same_items
from trainer.checkpoints import open_model
from trainer.initial_model import CATALOGUE, check_model
from trainer.list_data import ListData
from trainer.list_measures import measure_lists, order_metrics
from trainer.list_settings import ListSettings
from trainer.prompt_card import FILE, PromptCard


class NeedRole(StrEnum):
    """What the training of a model had to do with a need."""

    TRAINED = "trained"
    HELD_OUT = "held_out"
    """Kept from training, to measure needs that were not trained."""
    OTHER = "other"
    """The job left it out (`lists.train_needs`); an earlier job may have trained it."""


@dataclass(frozen=True, kw_only=True)
class ListRows:
    """Which prompts, and how they are answered."""

    split: str
    rows: int
    """Samples per need; 0 takes all."""
    ks: tuple[int, ...]
    """Cut-offs; those beyond the list are left out, and its length joins them."""
    seed: int
    batch: int = 64
    decode: Decode = Decode.BEAM
    width: int = 1
    """Beams, or samples per prompt."""
    trust_code: bool = False
    """Import the gains that the model names."""

    def spec(self, lists: ListSettings) -> DecodeSpec:
        """What a model's engines are asked for."""
        return DecodeSpec(decode=self.decode, width=self.width, seed=self.seed, lists=lists.spec)


@dataclass(frozen=True, kw_only=True)
class NeedRows:
    """What was measured for one need, prompt by prompt."""

    role: NeedRole
    prompt_id_N: LongArray
    user_id_N: IntArray
    value_N: dict[str, Floats]
    """By the name of the metric."""
    orders: dict[str, dict[str, Floats]]
    """The same for the orders that no policy made; one that is undefined for the need is not there."""
    invalid: float
    """Share of the lists."""
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class EvaluatedLists:
    """What `windlass eval --lists` answers from."""

    hf_dir: Path
    card: PromptCard
    needs: dict[str, NeedRows]
    ks: tuple[int, ...]
    violations: dict[str, int]
    engine: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ListModel:
    """A saved model of lists, and what it is asked."""

    hf_dir: Path
    catalogue: Catalogue
    card: PromptCard
    asked: dict[str, RankingPromptBatch]
    """Prompts by need."""

    @property
    def prompt_id_N(self) -> LongArray:
        """Ids of all prompts, increasing."""
        return np.sort([prompt.prompt_id for batch in self.asked.values() for prompt in batch.prompts])


def open_list_model(path: Path, dataset: Dataset, which: ListRows) -> ListModel:
    """A run's, checkpoint's or hf folder's model of lists, and the prompts that it is asked.

    Raises:
        RequestError: no model there, one of single items, one of other items, one that names code of its own and is not
            trusted, or a need that no prompt of the split has a gain for.
    """
    hf_dir = open_model(path)
    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    check_model(hf_dir, catalogue.vocabulary.size)
    check_same_items(hf_dir, catalogue, dataset)
    card = PromptCard.read(hf_dir)
    if not card.lists.on:
        raise RequestError("--lists", f"{hf_dir} recommends single items", "a model that was trained with lists.needs")
    if not which.trust_code:
        _refuse_code(card.lists, hf_dir / FILE)
    builder = card.builder(catalogue, hf_dir)
    text = builder if isinstance(builder, TextPromptBuilder) else None
    data = ListData.open(dataset, catalogue, card.lists, prompt_settings(card, dataset), text)
    asked = {need.name: data.evaluation(which.split, need.name, which.rows, which.seed) for need in card.lists.needs}
    return ListModel(hf_dir=hf_dir, catalogue=catalogue, card=card, asked=asked)


def _refuse_code(lists: ListSettings, card: Path) -> None:
    """Refuse to import what a model names, which may be anybody's.

    Raises:
        RequestError: names it.
    """
    legal = "built-in gains and ranker folders, or --trust-code for code that you know"
    for need in lists.needs:
        if need.gain:
            raise RequestError(str(card), f"need {need.name} names the code {need.gain} as its gain", legal)
    retriever = lists.retriever
    if retriever is not None and not (retriever.is_dir() or retriever.suffix == ".onnx"):
        raise RequestError(str(card), f"names the retriever {retriever}, which is no folder here", legal)


def evaluate_lists(
    model: ListModel, dataset: Dataset, which: ListRows, rollout: RolloutSettings, rankers: dict[str, Ranker]
) -> EvaluatedLists:
    """Evaluate a model of ranked lists through a fleet of its own; Ray must be connected.

    Args:
        model: with its prompts.
        dataset: that they come from.
        which: cut-offs and decoding.
        rollout: the engines.
        rankers: whose orders of the candidates are measured as well, by name.

    Raises:
        RequestError: a ranker fails.
    """
    card = model.card
    ks = cut_offs(which.ks, card.lists)
    count_I = dataset.train_counts()
    needs = {}
    with closing(RolloutFleet.start(rollout, model.hf_dir, model.catalogue)) as fleet:
        for name, batch in model.asked.items():
            value_N, invalid = measure_lists(fleet, batch.prompts, which.spec(card.lists), batch=which.batch, ks=ks)
            orders = candidate_orders(batch.prompts, count_I, rankers, seed=which.seed)
            needs[name] = NeedRows(
                role=role_of(name, card.lists),
                prompt_id_N=np.array([prompt.prompt_id for prompt in batch.prompts], np.int64),
                user_id_N=np.array([prompt.user_id for prompt in batch.prompts], np.int32),
                value_N=value_N,
                orders={
                    order: order_metrics(
                        batch.prompts, [row for row in rows if row is not None], card.lists.spec.width, ks
                    )
                    for order, rows in orders.items()
                    if all(row is not None for row in rows)
                },
                invalid=invalid,
                counts={reason: count for reason, count in batch.counts.items() if count},
            )
        return EvaluatedLists(
            hf_dir=model.hf_dir,
            card=card,
            needs=needs,
            ks=ks,
            violations={str(reason): count for reason, count in fleet.violations.items()},
            engine=dict(fleet.describe()),
        )


def prompt_settings(card: PromptCard, dataset: Dataset) -> PromptSettings:
    """How a model's prompts are written, for its dataset wherever it lies."""
    return PromptSettings(
        dataset=dataset.path,
        history=card.history,
        exclude_seen=card.exclude_seen,
        max_prompt_tokens=card.max_prompt_tokens,
    )


def role_of(need: str, lists: ListSettings) -> NeedRole:
    """What training had to do with a need."""
    if need == lists.held_out:
        return NeedRole.HELD_OUT
    return NeedRole.TRAINED if need in lists.trained() else NeedRole.OTHER


def cut_offs(ks: Sequence[int], lists: ListSettings) -> tuple[int, ...]:
    """The cut-offs that a list has, and its length."""
    return tuple(sorted({k for k in ks if k <= lists.spec.width} | {lists.spec.width}))


def rows_digest(card: PromptCard, dataset: Dataset) -> str:
    """Identifies what lists are measured on: evaluations may be compared where it is the same.

    What training alone reads (needs it takes, feedback, users of a critic) is no part of it.
    """
    kept = {"needs", "candidates", "positives", "source", "retriever", "length", "seed"}
    told = card.lists.model_dump(mode="json", include=kept) | {"history": card.history, "seen": card.exclude_seen}
    if card.text.items is ItemForm.TITLES:
        # Items of one title are one answer, so that candidate sets differ from those of codes.
        told["items"] = card.text.items.value
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return f"{dataset.fingerprint}+lists-{digest[:12]}"
