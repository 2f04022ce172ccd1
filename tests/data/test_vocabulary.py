"""Contract of `data.vocabulary`: token ids are dense and level by level, further words come last; the tokenizer that
transformers loads from a model's folder says the same ids. Not checked: loading in vLLM (tests of rollout do).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import RequestError
from data.vocabulary import Vocabulary, list_words, need_word


def test_ids_are_dense_and_level_by_level() -> None:
    vocabulary = Vocabulary([2, 3])
    assert vocabulary.size == 9
    assert (vocabulary.pad, vocabulary.bos, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)
    assert [vocabulary.code_token(0, c) for c in range(2)] == [4, 5]
    assert [vocabulary.code_token(1, c) for c in range(3)] == [6, 7, 8]
    assert vocabulary.code_tokens(np.array([1, 0]), np.array([2, 1])).tolist() == [8, 5]
    assert vocabulary.words() == ["<pad>", "<bos>", "<eos>", "<unk>", "<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"]


@pytest.mark.parametrize(("level", "code"), [(0, 2), (1, 3), (0, -1), (2, 0), (-1, 0)])
def test_codes_that_do_not_exist_are_refused(level: int, code: int) -> None:
    with pytest.raises(RequestError, match="codes: "):
        Vocabulary([2, 3]).code_token(level, code)
    with pytest.raises(RequestError, match="codes: "):
        Vocabulary([2, 3]).code_tokens(np.array([0, level]), np.array([0, code]))


@pytest.mark.parametrize("sizes", [[], [3, 0], [1] * 27])
def test_impossible_levels_are_refused(sizes: list[int]) -> None:
    with pytest.raises(RequestError, match="codes: "):
        Vocabulary(sizes)


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_the_tokenizer_loads_beside_a_model(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    vocabulary = Vocabulary([2, 3])
    AutoConfig.for_model(model_type, vocab_size=vocabulary.size).save_pretrained(tmp_path)
    vocabulary.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocabulary.size
    assert tokenizer.convert_ids_to_tokens(list(range(vocabulary.size))) == vocabulary.words()
    assert tokenizer.encode("<bos><a_1><b_2> <a_0>") == [1, 5, 8, 4]
    assert tokenizer.encode("no code") == [3, 3]
    assert tokenizer.decode([1, 5, 8]) == "<bos><a_1><b_2>"
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)


def test_further_words_come_last_and_change_no_other_id(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = Vocabulary([2, 3])
    wide = plain.with_words(list_words(["interest", "trend"]))
    assert wide.words() == [*plain.words(), "<candidates>", "<list>", "<need:interest>", "<need:trend>"]
    assert (wide.size, wide.word_token("<list>"), wide.word_token(need_word("trend"))) == (13, 10, 12)
    assert wide.with_words(list_words(["trend", "new"])).words() == [*wide.words(), "<need:new>"]
    assert wide != plain
    assert wide == Vocabulary([2, 3], list_words(["interest", "trend"]))
    assert wide.code_token(1, 2) == plain.code_token(1, 2)
    wide.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<bos><a_1><b_2><need:trend><candidates> <a_0><list>") == [1, 5, 8, 12, 9, 4, 10]


def test_words_that_cannot_be_told_apart_are_refused() -> None:
    for words in (["list"], ["<a b>"], ["<list>", "<list>"], ["<eos>"], ["<a_1>"], ["<<x>>"]):
        with pytest.raises(RequestError, match="further words"):
            Vocabulary([2, 3], words)
    with pytest.raises(RequestError, match="word: <list>; legal: none: the model was not made for lists"):
        Vocabulary([2, 3]).word_token("<list>")
