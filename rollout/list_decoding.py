"""What ranked lists need before and after the decoding loop: the checks of a request, the constraint, the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.candidates import check_candidates
from data.catalogue import Catalogue
from data.errors import RequestError
from data.list_constraint import ListConstraint
from data.lists import read_lists
from data.records import FORMAT_SEGMENT, Decode, DecodeSpec, Finish, Groups, ListSpec, Prompt
from data.trie import ItemTrie
from data.vocabulary import LIST_WORD


def check_lists(prompts: Sequence[Prompt], spec: DecodeSpec, catalogue: Catalogue) -> None:
    """Refuse what no list can be decoded of, and candidates where no list is asked for.

    Raises:
        RequestError: names the setting, or the prompt and what is wrong with its candidates.
    """
    lists = spec.lists
    if lists is None:
        given = [prompt.prompt_id for prompt in prompts if prompt.candidates is not None]
        if given:
            raise RequestError(f"prompt {given[0]}", "candidates, but no list is asked for", "a request for lists")
        return
    _check_spec(spec, lists)
    if lists.text_tokens:
        catalogue.vocabulary.word_token(LIST_WORD)
    for prompt in prompts:
        if prompt.candidates is None:
            raise RequestError(f"prompt {prompt.prompt_id}: candidates", "none", "the items that its list ranks")
        if prompt.scored_items:
            raise RequestError(f"prompt {prompt.prompt_id}: scored_items", prompt.scored_items, "none, for lists")
        check_candidates(
            f"prompt {prompt.prompt_id}",
            prompt.candidates,
            catalogue.active_path_id,
            least=max(1, lists.length),
            most=lists.candidates,
        )


def _check_spec(spec: DecodeSpec, lists: ListSpec) -> None:
    if not spec.constrained:
        raise RequestError("decode: lists", "without the constraint", "constrained decoding")
    if lists.candidates < 1 or not 0 <= lists.length <= lists.candidates or lists.text_tokens < 0:
        found = f"{lists.length} of {lists.candidates} candidates after {lists.text_tokens} tokens"
        raise RequestError("decode: lists", found, "0 (all) or more of at least one candidate, after 0 or more tokens")
    if lists.text_tokens and spec.decode is Decode.SAMPLE_WITHOUT_REPLACEMENT:
        # Every token of the vocabulary would need noise of its own, for every beam.
        raise RequestError("decode", f"{spec.decode.value} with free text", "beam, sample")


def list_constraint(trie: ItemTrie, lists: ListSpec, catalogue: Catalogue, vocabulary_size: int) -> ListConstraint:
    """The constraint of a request.

    Raises:
        RequestError: free text is asked for, and the vocabulary has no word that ends it.
    """
    vocabulary = catalogue.vocabulary
    begin = vocabulary.word_token(LIST_WORD) if lists.text_tokens else vocabulary.eos
    # Rows behind the tokens pad the matrices of a language model: no text has them.
    tokens = vocabulary_size if vocabulary.text is None else vocabulary.tokens
    return ListConstraint(trie, lists, begin_token=begin, vocabulary_size=tokens)


def with_lists(groups: Groups, constraint: ListConstraint, prompts: Sequence[Prompt]) -> Groups:
    """The groups with the items, spans and finish reasons of their lists, and without tokens that none of them has."""
    tokens = max(1, int(groups.length_PG.max(initial=0)))
    token_PGT = groups.token_PGT[..., :tokens]
    candidates = [prompt.constraint_items for prompt in prompts]
    item_PGK, segment_PGT = read_lists(constraint, candidates, token_PGT, groups.length_PG)
    text_PG = (segment_PGT == FORMAT_SEGMENT).sum(2)
    cut_PG = (text_PG > constraint.lists.text_tokens) & (constraint.lists.text_tokens > 0)
    finish_PG = np.where(cut_PG, Finish.LIST_TEXT_CUT.value, Finish.LIST.value)
    return replace(
        groups,
        token_PGT=token_PGT,
        logp_PGT=groups.logp_PGT[..., :tokens],
        finish_PG=np.where(groups.valid_PG, finish_PG, Finish.ABSENT.value),
        item_PGK=item_PGK,
        segment_PGT=segment_PGT,
    )
