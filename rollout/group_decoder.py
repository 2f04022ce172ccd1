"""From prompts to groups: checks the request, picks the constraint, decodes chunk by chunk, packs the record.

Used by the vLLM worker and by the reference engine alike, so that both generate under the same constraint code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.catalogue import Catalogue
from data.constraint import Constraint
from data.errors import RequestError
from data.list_constraint import ListConstraint
from data.records import NO_ITEM, BoolArray, Decode, DecodeSpec, Finish, Groups, IntArray, Prompt
from data.trie_constraint import TrieConstraint
from rollout.decoding import Backend, Completions, decode
from rollout.list_decoding import check_lists, list_constraint, with_lists
from rollout.settings import HeadRows
from rollout.unconstrained import Unconstrained

_LARGE = 8
"""A vocabulary this many times as large as a level is worth computing only the rows of the level for."""


class GroupDecoder:
    """Decodes prompts under the constraints of one catalogue on one device."""

    def __init__(
        self,
        catalogue: Catalogue,
        device: torch.device,
        *,
        vocabulary_size: int,
        max_model_len: int,
        head: HeadRows = HeadRows.ALL,
    ) -> None:
        """Args:
            vocabulary_size: number of logits of the model.
            max_model_len: its longest sequence.
            head: for which tokens the backend is asked for logits under the constraint.

        Raises:
            RequestError: the model's vocabulary is smaller than the catalogue's.
        """
        if vocabulary_size < catalogue.vocabulary.size:
            raise RequestError(
                "model vocabulary", vocabulary_size, f"at least the catalogue's {catalogue.vocabulary.size} tokens"
            )
        self._catalogue = catalogue
        self._trie = catalogue.trie().to(device)
        self._digest = catalogue.digest
        self._vocabulary_size = vocabulary_size
        # Rows behind the tokens pad the matrices of a language model: no text has them.
        self._tokens = vocabulary_size if catalogue.vocabulary.text is None else catalogue.vocabulary.tokens
        self.max_model_len = max_model_len
        levels = [self._trie.level_tokens(depth) for depth in range(self._trie.depth)]
        large = vocabulary_size >= _LARGE * max(len(token_V) for token_V in levels)
        self._levels = levels if head is HeadRows.LEVEL or (head is HeadRows.AUTO and large) else None

    @staticmethod
    def load(
        hf_dir: Path,
        device: torch.device,
        *,
        vocabulary_size: int,
        max_model_len: int,
        head: HeadRows = HeadRows.ALL,
    ) -> GroupDecoder:
        """The decoder for the catalogue inside an hf folder; raises RequestError where there is none."""
        catalogue = Catalogue.load(Path(hf_dir) / "catalogue")
        return GroupDecoder(catalogue, device, vocabulary_size=vocabulary_size, max_model_len=max_model_len, head=head)

    def completion_tokens(self, spec: DecodeSpec) -> int:
        """Tokens of the longest completion."""
        if spec.lists is not None:
            return list_constraint(self._trie, spec.lists, self._catalogue, self._vocabulary_size).max_tokens
        return self._trie.depth if spec.constrained else spec.max_tokens or self._trie.depth

    def check(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> None:
        """Refuse what cannot be decoded.

        Raises:
            RequestError: an unknown strategy, no prompts, or a prompt that is empty, too long or of unknown tokens.
        """
        if spec.decode is Decode.SAMPLE_WITHOUT_REPLACEMENT and not spec.constrained:
            # Every token of the vocabulary would need noise of its own, for every beam.
            raise RequestError("decode", f"{spec.decode.value} without the constraint", "beam, sample")
        if spec.width < 1 or not spec.temperature > 0:
            raise RequestError("decode", f"width {spec.width}, temperature {spec.temperature}", "both above 0")
        if not prompts:
            raise RequestError("prompts", "none", "at least one")
        check_lists(prompts, spec, self._catalogue)
        longest = self.max_model_len - self.completion_tokens(spec)
        for prompt in prompts:
            ids = prompt.token_ids
            if not 1 <= len(ids) <= longest:
                raise RequestError(
                    f"prompt {prompt.prompt_id}",
                    f"{len(ids)} tokens",
                    f"1 to {longest} (rollout.max_model_len {self.max_model_len} less the completion)",
                )
            for item in prompt.scored_items:
                if not 0 <= item < len(self._trie.item_leaf_I) or self._trie.item_leaf_I[item] < 0:
                    raise RequestError(
                        f"prompt {prompt.prompt_id}, scored_items", item, "items of the catalogue that are not retired"
                    )
            if ids.min() < 0 or ids.max() >= self._vocabulary_size:
                raise RequestError(
                    f"prompt {prompt.prompt_id}",
                    f"token ids {ids.min()} to {ids.max()}",
                    f"0 to {self._vocabulary_size - 1}",
                )

    def check_sequences(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> None:
        """Refuse sequences that cannot be scored.

        Raises:
            RequestError: nothing to score, an empty part, too many tokens, or an unknown token.
        """
        if not len(prompts):
            raise RequestError("sequences", "none", "at least one")
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            tokens = np.concatenate([prompt, completion])
            if not len(prompt) or not len(completion) or len(tokens) > self.max_model_len:
                raise RequestError(
                    f"sequence {row}",
                    f"{len(prompt)} + {len(completion)} tokens",
                    f"at least 1 + 1, at most {self.max_model_len} together",
                )
            if tokens.min() < 0 or tokens.max() >= self._vocabulary_size:
                raise RequestError(f"sequence {row}", "unknown token ids", f"0 to {self._vocabulary_size - 1}")

    @torch.no_grad()
    def generate(
        self,
        backend: Backend,
        chunks: Sequence[slice],
        prompts: Sequence[Prompt],
        spec: DecodeSpec,
        *,
        exclude: bool | None,
        weight_version: int,
        engine_id: str,
    ) -> Groups:
        """Decode the prompts, `chunks` of them at a time; call `check` first."""
        constraint = self._constraint(prompts, spec, exclude)
        most = max(len(prompt.scored_items) for prompt in prompts)
        parts = []
        for chunk in chunks:
            some = prompts[chunk]
            parts.append(
                decode(
                    backend,
                    constraint,
                    prompts=[prompt.token_ids for prompt in some],
                    prompt_id_P=np.array([prompt.prompt_id for prompt in some], np.int64),
                    items=[prompt.constraint_items for prompt in some],
                    spec=spec,
                    levels=self._levels if spec.constrained and spec.lists is None else None,
                    scored_PMT=self._paths(some, most) if most else None,
                )
            )
        done = Completions(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))
        valid_PG: BoolArray = done.valid_PS.numpy()
        item_PG: IntArray = done.item_PS.numpy().astype(np.int32)
        finish = np.where(item_PG == NO_ITEM, Finish.LENGTH.value, Finish.ITEM.value)
        groups = Groups(
            prompt_id_P=np.array([prompt.prompt_id for prompt in prompts], np.int64),
            valid_PG=valid_PG,
            token_PGT=done.token_PST.numpy().astype(np.int32),
            length_PG=done.length_PS.numpy().astype(np.int32),
            item_PG=item_PG,
            logp_PGT=done.logp_PST.numpy(),
            finish_PG=np.where(valid_PG, finish, Finish.ABSENT.value),
            weight_version_P=np.full(len(prompts), weight_version, np.int64),
            engine_id_P=np.full(len(prompts), engine_id),
            spec=spec,
            constraint=constraint.spec,
            catalogue_digest=self._digest,
            threshold_P=done.threshold_P.numpy() if spec.decode is Decode.SAMPLE_WITHOUT_REPLACEMENT else None,
            scored_logp_PMT=done.scored_PMT.numpy() if most else None,
        )
        return with_lists(groups, constraint, prompts) if isinstance(constraint, ListConstraint) else groups

    def _paths(self, prompts: Sequence[Prompt], most: int) -> torch.Tensor:
        """Tokens of the scored items, int64 `[P, M, T]` padded with -1."""
        trie = self._trie
        item_PM = torch.full((len(prompts), most), NO_ITEM)
        for row, prompt in enumerate(prompts):
            item_PM[row, : len(prompt.scored_items)] = torch.tensor(prompt.scored_items, dtype=torch.long)
        item_PM = item_PM.to(trie.device)
        leaf_PM = torch.where(item_PM >= 0, trie.item_leaf_I[item_PM.clamp(min=0)], -1)
        # From the root down: the ancestors come from the leaf up, with -1 where there are none.
        node_XD = trie.ancestors(leaf_PM.flatten()).flip(1)
        token_XD = torch.where(node_XD > 0, trie.token_E[(node_XD - 1).clamp(min=0)], -1)
        order_XD = (token_XD < 0).int().argsort(dim=1, stable=True)
        return token_XD.gather(1, order_XD)[:, : trie.depth].view(*item_PM.shape, trie.depth)

    def _constraint(self, prompts: Sequence[Prompt], spec: DecodeSpec, exclude: bool | None) -> Constraint[Any]:
        if not spec.constrained:
            return Unconstrained(self._trie, vocabulary_size=self._tokens, max_tokens=self.completion_tokens(spec))
        if spec.lists is not None:
            return list_constraint(self._trie, spec.lists, self._catalogue, self._vocabulary_size)
        return TrieConstraint(self._trie, exclude=has_exclusions(prompts) if exclude is None else exclude)


def has_exclusions(prompts: Sequence[Prompt]) -> bool:
    """Whether any prompt of a request names items it may not get; decided once for all shards of the request."""
    return any(len(prompt.exclusions) for prompt in prompts)
