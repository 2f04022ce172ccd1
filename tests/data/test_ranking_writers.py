"""Contract: a language model's ranking prompt is its template around instruction, need, latest history and candidates,
in titles or codes; the oldest items go first, and what a template drops or a prompt has no room for is refused.

Not checked here: prompts of codes alone (tests/data/test_ranking_prompts.py), lists that a model makes of the prompts
(tests/trainer/test_language_lists.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import RequestError
from data.needs import Need, NeedSettings, load_needs
from data.ranking_writers import LIST_INSTRUCTION, PHRASES, TextWriter, need_text
from data.text_settings import TextSettings
from tests.data.test_text_prompts import make
from tests.tiny_language import write_tokenizer

HISTORY, CANDIDATES = np.array([0, 1], np.int32), np.array([3, 2], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


def needs(*names: str) -> tuple[Need, ...]:
    return load_needs([NeedSettings(name=name) for name in names])


def written(folder: Path, *, longest: int = 400, **settings: Any) -> tuple[list[int], str, int]:
    """The history that is shown, the text and the number of tokens."""
    builder = make(folder, longest=longest, form="plain", **settings)
    shown, tokens = TextWriter(builder, needs("interest", "trend"), candidates=2).write(HISTORY, CANDIDATES, 1)
    return shown.tolist(), builder.tokenizer.decode(tokens.tolist()), len(tokens)


def test_a_prompt_says_need_history_and_candidates(folder: Path) -> None:
    asked = f"The customer wants: {PHRASES['trend']}\n"
    # Candidates are written as answers are; codes where items are codes.
    listed = "Candidates:\n- <a_1><b_2>\n- <a_1><b_0>\n"
    assert written(folder)[:2] == ([0, 1], f"{LIST_INSTRUCTION}\n{asked}- Heat\n- Alien\n{listed}")
    own = written(folder, history="codes", instruction="Rank.", needs={"trend": "hits"})
    assert own[1] == f"Rank.\nThe customer wants: hits\n- <a_0><b_1>\n- <a_0>\n{listed}"
    builder = make(folder)
    _, tokens = TextWriter(builder, needs("niche"), candidates=2).write(HISTORY[:0], CANDIDATES, 0)
    text = builder.tokenizer.decode(tokens.tolist())
    assert text.startswith(f"<|start|>user\n{LIST_INSTRUCTION}\nThe customer wants: {PHRASES['niche']}\nCandidates:\n")
    assert text.endswith("- <a_1><b_0><|end|>\n<|start|>assistant\n")


def test_the_oldest_items_go_and_candidates_stay(folder: Path) -> None:
    _, whole, tokens = written(folder)
    shown, text, fewer = written(folder, longest=tokens - 1)
    assert (shown, fewer < tokens) == ([1], True)
    assert text == whole.replace("- Heat\n", "")
    assert written(folder, longest=fewer)[0] == [1]
    legal = rf"data\.max_prompt_tokens: {fewer - 1}; legal: at least {fewer}, for 2 candidates"
    with pytest.raises(RequestError, match=legal):
        written(folder, longest=fewer - 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in history %}{{ x }}{% endfor %}{{ need }}", "does not show all candidates"),
        ("{% for x in history %}{{ x }}{% endfor %}{{ need }}{{ candidates[:1] }}", "all candidates"),
        ("{% for x in history + candidates %}{{ x }}{% endfor %}", "does not show the need; legal: .* {{ need }}"),
        ("{{ need }}{% for x in candidates or history %}{{ x }}{% endfor %}", "the whole history beside candidates"),
        ("{{ need }}{{ candidates }}{{ history[-2:] if candidates else history }}", "the whole history beside"),
    ],
)
def test_a_template_shows_everything(folder: Path, template: str, message: str) -> None:
    builder = make(folder, template=template)
    with pytest.raises(RequestError, match=rf"text\.template: .*{message}"):
        TextWriter(builder, needs("interest", "trend"), candidates=2)


def test_one_need_may_go_without_saying(folder: Path) -> None:
    template = "{% for x in history + candidates %}{{ x }}{% endfor %}"
    TextWriter(make(folder, template=template), needs("interest"), candidates=9)


def test_needs_are_said_in_the_words_of_their_instruction() -> None:
    (need,) = load_needs([NeedSettings(name="discover", instruction=("explore", "short_films"))])
    assert need_text(need, TextSettings()) == f"{PHRASES['explore']} and short films"
    assert need_text(need, TextSettings(needs={"discover": "a find"})) == "a find"
