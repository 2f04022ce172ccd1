"""Groups as an engine would return them, from the items they got; for the tests of what builds and refills groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.catalogue import Catalogue
from data.records import NO_ITEM, Decode, DecodeSpec, Finish, Groups, Prompt


def catalogue() -> Catalogue:
    """Eight items with paths of two and three tokens: 2 and 3 share theirs, 7 is retired."""
    codes = [[0, 0], [0, 1, 0], [1, 0], [1, 0], [1, 1, 1], [2, 0], [2, 1], [3, 0]]
    return Catalogue.from_codes(codes).retire([7])


def prompts_for(targets: Sequence[int], *, first_id: int = 0, exclusions: tuple[int, ...] = ()) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=first_id + row,
            token_ids=np.array([1], np.int32),
            user_id=row,
            history=np.zeros(0, np.int32),
            exclusions=np.array(exclusions, np.int32),
            target=target,
        )
        for row, target in enumerate(targets)
    ]


def groups_of(prompts: Sequence[Prompt], items: Sequence[Sequence[int]], *, step: int = 1) -> Groups:
    """Groups of the items, in two-token completions where the items have such paths; `NO_ITEM` slots are absent."""
    item_PG = np.array(items, np.int32)
    valid_PG = item_PG != NO_ITEM
    token_PGT, length_PG = catalogue().padded_tokens(item_PG)
    return Groups(
        prompt_id_P=np.array([prompt.prompt_id for prompt in prompts], np.int64),
        valid_PG=valid_PG,
        token_PGT=token_PGT,
        length_PG=length_PG,
        item_PG=item_PG,
        logp_PGT=np.where(token_PGT >= 0, -1.0, 0.0).astype(np.float32),
        finish_PG=np.where(valid_PG, Finish.ITEM.value, Finish.ABSENT.value),
        weight_version_P=np.zeros(len(prompts), np.int64),
        engine_id_P=np.full(len(prompts), "engine"),
        spec=DecodeSpec(decode=Decode.BEAM, width=item_PG.shape[1], step=step),
        constraint="item_trie",
        catalogue_digest="",
    )
