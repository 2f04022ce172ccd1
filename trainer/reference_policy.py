"""Asking the reference policy: a language model of the fleet, or chance, among candidates drawn for each state.

The candidates of a state are active items of different token paths that the user has not seen, drawn by (seed, state).
The model is shown the latest items (a language model the candidates too) and answers by constrained beams whose only
legal items are the candidates, so its answers are valid and distinct by construction; there are fewer where fewer
candidates are left.

Source: methods.md section 5, "Reference". Suffixes: `_M` state, `_R` answer, `_C` candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.candidates import CandidateFiller
from data.catalogue import Catalogue
from data.errors import RequestError
from data.needs import NeedSettings, load_needs
from data.ranking_writers import TextWriter
from data.records import NO_ITEM, Decode, DecodeSpec, IntArray, ListSpec, LongArray, Prompt
from data.text_prompts import TextPromptBuilder
from data.transitions import Sessions
from rollout.fleet import RolloutFleet
from rollout.settings import RolloutSettings
from trainer.checkpoint_evaluation import check_same_items
from trainer.checkpoints import file_digest, open_model
from trainer.initial_model import CATALOGUE, check_model
from trainer.laac_settings import ReferenceKind, ReferenceSettings
from trainer.prompt_card import PromptCard
from trainer.reference_answers import ReferenceAnswers

PROMPTS = 256
"""States per request to the fleet."""
_CANDIDATE_STREAM = 51
_STATE_STREAM = 52
Report = Callable[[int, int], None]
"""Told how many states of how many are answered."""


def asked_states(sessions: Sessions, settings: ReferenceSettings) -> LongArray:
    """Events whose states the reference is asked: the training ones (or their seeded sample), and the test rows."""
    train = sessions.transitions.event_N
    if settings.states is not None and settings.states < len(train):
        random = np.random.default_rng([sessions.settings.user_seed, _STATE_STREAM])
        train = random.choice(train, size=settings.states, replace=False)
    if not settings.test_rows:
        return np.unique(train)
    return np.unique(np.concatenate([train, sessions.rows("test").event_N]))


def description(sessions: Sessions, settings: ReferenceSettings, digest: str | None) -> dict[str, Any]:
    """How the reference is asked; what a cache must agree with."""
    return {
        "kind": settings.kind.value,
        "model_digest": digest,
        "dataset": sessions.dataset.fingerprint,
        "window": settings.window if settings.kind is ReferenceKind.LLM else None,
        "candidates": settings.candidates,
        "show_candidates": settings.show_candidates if settings.kind is ReferenceKind.LLM else None,
        "answers": settings.answers,
        "exclude_seen": sessions.settings.exclude_seen,
        "seed": sessions.settings.user_seed,
    }


def model_digest(hf_dir: Path) -> str:
    """Digest of the weights of a model folder."""
    files = sorted(hf_dir.glob("*.safetensors"))
    return "-".join(file_digest(file) for file in files)


def random_answers(sessions: Sessions, settings: ReferenceSettings) -> ReferenceAnswers:
    """Chance: the first of each state's candidates, from all items of the dataset."""
    event_M = asked_states(sessions, settings)
    n_items = sessions.dataset.n_items
    item_MR = np.full((len(event_M), settings.answers), NO_ITEM, np.int32)
    for row, (event, seen) in enumerate(zip(event_M.tolist(), seen_items(sessions, event_M), strict=True)):
        free = np.ones(n_items, np.bool_)
        free[seen] = False
        random = np.random.default_rng([sessions.settings.user_seed, _CANDIDATE_STREAM, event])
        drawn = random.permutation(np.flatnonzero(free))[: min(settings.answers, settings.candidates)]
        item_MR[row, : len(drawn)] = drawn
    return ReferenceAnswers(
        event_M=event_M,
        user_M=sessions.dataset.events.user_E[event_M],
        item_MR=item_MR,
        asked=description(sessions, settings, None),
    )


def model_answers(
    sessions: Sessions,
    settings: ReferenceSettings,
    rollout: RolloutSettings,
    report: Report = lambda done, total: None,
) -> ReferenceAnswers:
    """Ask the model of `settings` through a fleet; Ray must be connected.

    Raises:
        RequestError: no model, one of other items, or one that ranks lists.
    """
    if settings.model is None:
        legal = "a run, checkpoint or hf folder; or laac.reference.cache of a written cache"
        raise RequestError("laac.reference.model", "none", legal)
    hf_dir = open_model(settings.model)
    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    check_model(hf_dir, catalogue.vocabulary.size)
    check_same_items(hf_dir, catalogue, sessions.dataset)
    if PromptCard.read(hf_dir).lists.on:
        raise RequestError("laac.reference.model", f"{settings.model} ranks lists", "a model of single items")
    event_M = asked_states(sessions, settings)
    asks = _Prompts(sessions, settings, catalogue, hf_dir, rollout.max_model_len)
    spec = DecodeSpec(
        decode=Decode.BEAM,
        width=settings.answers,
        temperature=rollout.temperature,
        seed=sessions.settings.user_seed,
        lists=ListSpec(candidates=settings.candidates, length=1),
    )
    item_MR = np.full((len(event_M), settings.answers), NO_ITEM, np.int32)
    with closing(RolloutFleet.start(rollout, hf_dir, catalogue)) as fleet:
        for first in range(0, len(event_M), PROMPTS):
            rows, prompts = asks.of(event_M, range(first, min(first + PROMPTS, len(event_M))))
            if prompts:
                groups = fleet.generate(prompts, spec)
                item_MR[rows] = np.where(groups.valid_PG, groups.item_PG, NO_ITEM)
            report(min(first + PROMPTS, len(event_M)), len(event_M))
    return ReferenceAnswers(
        event_M=event_M,
        user_M=sessions.dataset.events.user_E[event_M],
        item_MR=item_MR,
        asked=description(sessions, settings, model_digest(hf_dir)),
    )


class _Prompts:
    """Prompts of states as the model was trained on them: the latest items, and the candidates that may be answered."""

    def __init__(
        self,
        sessions: Sessions,
        settings: ReferenceSettings,
        catalogue: Catalogue,
        hf_dir: Path,
        max_model_len: int | None,
    ) -> None:
        """
        Args:
            max_model_len: tokens of a prompt with its answer; none keeps the model's own longest prompt.

        Raises:
            RequestError: a template that drops the candidates, or a prompt that has no room for them.
        """
        self._sessions = sessions
        self._settings = settings
        card = PromptCard.read(hf_dir)
        shown = card.text.on and settings.show_candidates
        changes: dict[str, Any] = {"history": settings.window, "exclude_seen": False}
        if shown and max_model_len is not None:
            changes["max_prompt_tokens"] = max_model_len - int(np.diff(catalogue.path_start).max())
        self._builder = card.model_copy(update=changes).builder(catalogue, hf_dir)
        self._writer: TextWriter | None = None
        if shown and isinstance(self._builder, TextPromptBuilder):
            self._writer = TextWriter(
                self._builder, load_needs([NeedSettings(name="interest")]), candidates=settings.candidates
            )
        self._filler = CandidateFiller(catalogue)

    def of(self, event_M: LongArray, rows: Sequence[int]) -> tuple[list[int], list[Prompt]]:
        """The rows that have a candidate, and their prompts."""
        seen = seen_items(self._sessions, event_M[list(rows)])
        kept, prompts = [], []
        for row, own in zip(rows, seen, strict=True):
            event = int(event_M[row])
            candidates, _ = self._filler.fill(
                np.zeros(0, np.int32),
                self._settings.candidates,
                own,
                None,
                (self._sessions.settings.user_seed, _CANDIDATE_STREAM, event),
            )
            if len(candidates):
                kept.append(row)
                prompts.append(self._prompt(event, candidates))
        return kept, prompts

    def _prompt(self, event: int, candidates: IntArray) -> Prompt:
        history = self._history(event)
        prompt, _ = self._builder.prompt(history, event)
        if self._writer is not None:
            shown, tokens = self._writer.write(history, candidates, 0)
            prompt = replace(prompt, token_ids=tokens, history=shown)
        return replace(prompt, candidates=candidates, exclusions=np.zeros(0, np.int32))

    def _history(self, event: int) -> IntArray:
        start = int(self._sessions.start_of(np.array([event]))[0])
        return self._sessions.item_E[max(start, event - self._settings.window) : event]


def seen_items(sessions: Sessions, event_M: LongArray) -> Iterator[IntArray]:
    """Items of each state, which are no candidates; none where seen items may be recommended."""
    for event, start in zip(event_M.tolist(), sessions.start_of(event_M).tolist(), strict=True):
        yield sessions.item_E[start:event] if sessions.settings.exclude_seen else sessions.item_E[:0]
