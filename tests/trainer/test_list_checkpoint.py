"""Contract of `trainer.list_checkpoint`: roles of needs, cut-offs, and which evaluations may be compared.

Not checked: what is measured (test_list_measures.py), real lists (tests/launch/test_list_eval.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.dataset import Dataset
from tests.small_world import write_dataset
from trainer.list_checkpoint import NeedRole, cut_offs, role_of, rows_digest
from trainer.list_settings import ListSettings
from trainer.prompt_card import PromptCard


def lists(**changes: Any) -> ListSettings:
    needs = [{"name": name} for name in ("interest", "trend", "niche")]
    return ListSettings.model_validate({"needs": needs, "candidates": 4, "positives": 2, **changes})


def test_roles_and_cut_offs() -> None:
    held = lists(held_out="niche", train_needs=["interest"])
    roles = [role_of(name, held) for name in ("interest", "trend", "niche")]
    assert roles == [NeedRole.TRAINED, NeedRole.OTHER, NeedRole.HELD_OUT]
    assert cut_offs((50, 1, 3), held) == (1, 3, 4)
    assert cut_offs((5,), lists(length=3)) == (3,)


def test_what_training_alone_reads_does_not_keep_evaluations_apart(tmp_path: Path) -> None:
    dataset: Dataset = write_dataset(tmp_path)

    def digest(history: int = 6, **changes: Any) -> str:
        card = PromptCard(history=history, exclude_seen=True, max_prompt_tokens=64, lists=lists(**changes))
        return rows_digest(card, dataset)

    same = digest()
    assert digest(feedback=0.1, critic_users=0.25, held_out="trend") == same == digest(train_needs=["niche"])
    others = {digest(candidates=5), digest(seed=2), digest(positives=3), digest(length=3), digest(history=7)}
    assert len(others | {same}) == 6
