"""Contract: a language model's prompt is the template around the latest items that fit, in titles or codes, tokenised
as one text; the answer of a supervised row is the item's path with an end token; tasks are drawn by their weights.

Bad templates and tokenizers are refused with one line. Not checked here: what a model makes of the prompts.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.catalogue import Catalogue
from data.dataset import Samples
from data.errors import RequestError
from data.text_items import code_catalogue
from data.text_prompts import PromptTemplate, TextPromptBuilder
from data.text_settings import INSTRUCTION, ItemForm, TextSettings
from data.text_tasks import TaskRows
from data.text_tokenizer import TextTokenizer
from tests.tiny_language import write_tokenizer

CODES = [[0, 1], [0], [1, 0], [1, 2]]
TITLES = ["Heat", "Alien", "Big", "Up"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


def make(folder: Path, *, longest: int = 400, **settings: Any) -> TextPromptBuilder:
    tokenizer = TextTokenizer.open(folder)
    catalogue = code_catalogue(Catalogue.from_codes(CODES, TITLES), tokenizer.base(400))
    tokenizer.extend(catalogue.vocabulary)
    text = TextSettings(items="codes", **settings)
    return TextPromptBuilder(catalogue, 3, True, longest, settings=text, tokenizer=tokenizer)


def samples(rows: int) -> Samples:
    values = np.array([0, 1, 2, 3], dtype=np.int32)
    same = np.zeros(rows, dtype=np.int64)
    return Samples(
        user_id_N=np.arange(rows, dtype=np.int32),
        target_N=np.full(rows, 3, dtype=np.int32),
        timestamp_N=same,
        sample_id_N=np.arange(rows),
        values=values,
        start_N=same,
        end_N=same + 3,
    )


@pytest.mark.parametrize(
    ("form", "history", "expected"),
    [
        ("chat", "titles", f"<|start|>user\n{INSTRUCTION}\n- Heat\n- Alien<|end|>\n<|start|>assistant\n"),
        ("chat", "codes", f"<|start|>user\n{INSTRUCTION}\n- <a_0><b_1>\n- <a_0><|end|>\n<|start|>assistant\n"),
        ("plain", "titles", f"{INSTRUCTION}\n- Heat\n- Alien\n"),
    ],
)
def test_a_prompt_is_the_template_around_the_history(folder: Path, form: str, history: str, expected: str) -> None:
    builder = make(folder, form=form, history=history)
    prompt, counts = builder.prompt(np.array([0, 1]))
    assert builder.tokenizer.decode(prompt.token_ids.tolist()) == expected
    assert not any(counts.values())
    codes = [token for token in prompt.token_ids.tolist() if token >= builder.catalogue.vocabulary.first_code]
    # The end token that closes the path of item 1, which begins another's, belongs to answers only.
    assert codes == ([330, 333, 330] if history == "codes" else [])


def test_the_oldest_items_are_left_out_and_counted(folder: Path) -> None:
    whole = make(folder).prompt(np.array([0, 1, 2]))[0]
    builder = make(folder, longest=len(whole.token_ids) - 1)
    prompt, counts = builder.prompt(np.array([0, 1, 2]))
    assert prompt.history.tolist() == [1, 2]
    assert counts["shortened"] == 1
    assert len(prompt.token_ids) < len(whole.token_ids)
    with pytest.raises(RequestError, match=r"data\.max_prompt_tokens: 20; legal: at least \d+"):
        make(folder, longest=20)


def test_a_text_begins_once(folder: Path) -> None:
    """The chat template of these tests writes the beginning token; a plain prompt gets it from the setting."""
    for form in ("chat", "plain"):
        tokens = make(folder, form=form, begin_with_bos=True).prompt(np.array([0]))[0].token_ids
        assert tokens.tolist().count(1) == (2 if form == "chat" else 1)
        assert tokens[0] == 1


def test_a_chat_template_that_tells_the_date_tells_one(folder: Path, tmp_path: Path) -> None:
    """Llama's and others' do: a run that goes on tomorrow, or serves, must write the prompts it was trained on."""
    shutil.copytree(folder, tmp_path / "dated")
    dated = "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "dated" / "chat_template.jinja").write_text(dated)
    assert TextTokenizer.open(tmp_path / "dated").chat("hello") == "26 Jul 2024: hello"


def test_need_and_candidates_are_written_where_they_are_given(folder: Path) -> None:
    template = PromptTemplate(
        TextSettings(items="codes", form="plain", instruction="Rank."), TextTokenizer.open(folder)
    )
    assert template.text(["a"], need="cheap", candidates=["x", "y"]) == (
        "Rank.\nThe customer wants: cheap\n- a\nCandidates:\n- x\n- y\n"
    )


def test_answers_end_and_tasks_follow_their_weights(folder: Path) -> None:
    builder = make(folder, tasks={"next_item": 1, "title_to_code": 2, "code_to_title": 1, "next_title": 1})
    rows = TaskRows(builder, samples(400), seed=1, epoch=0)
    seen: Counter[str] = Counter()
    end = builder.catalogue.vocabulary.eos
    for tokens, learned in rows[:]:
        answer, prompt = tokens[learned].tolist(), builder.tokenizer.decode(tokens[~learned].tolist())
        assert answer[-1] == end
        assert learned.tolist() == sorted(learned.tolist())
        asked = "to_code" if "codes of" in prompt else "to_title" if "title of" in prompt else "next"
        path = builder.catalogue.tokens(3).tolist()
        seen[f"{asked} {'code' if answer[:-1] == path else builder.tokenizer.decode(answer[:-1])}"] += 1
    assert set(seen) == {"next code", "next Up", "to_code code", "to_title Up"}
    assert seen["to_code code"] == pytest.approx(160, abs=40)
    again = TaskRows(builder, samples(400), seed=1, epoch=0)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(rows[:5], again[:5], strict=True))
    other = TaskRows(builder, samples(400), seed=1, epoch=1)
    assert not all(np.array_equal(a[0], b[0]) for a, b in zip(rows[:9], other[:9], strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{{ instruction }}"}, "does not show the whole history"),
        ({"template": "{{ history[-1] }}"}, "does not show the whole history"),
        ({"template": "{{ history[:2] }}"}, "does not show the whole history"),
        ({"template": "{{ history + 1 }}"}, r"text\.template: can only concatenate list"),
        ({"template": "{{ history }}{{ history[1] }}"}, "list object has no element 1"),
        ({"template": "{{ history }}{{ history.__class__.__mro__ }}"}, "access to attribute '__class__' .* is unsafe"),
        ({"template": "{{ history }}{{ lipsum() }}"}, "'lipsum' is undefined"),
        ({"template": "{{ history }}{{ history | random }}"}, "No filter named 'random'"),
        ({"template": "{% for x in history %}"}, "Unexpected end of template"),
        ({"template": "{{ user }}"}, "'user' is undefined"),
        ({"begin_with_bos": True, "form": "plain"}, None),
    ],
)
def test_templates_are_checked(folder: Path, settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert make(folder, **settings).prompt(np.array([0]))[0].token_ids[0] == 1
        return
    with pytest.raises(RequestError, match=message):
        make(folder, **settings)


def test_tokenizers_are_checked(tmp_path: Path) -> None:
    def opened(name: str, pad_token: str | None = None, **arguments: bool) -> TextTokenizer:
        path = tmp_path / name
        path.mkdir()
        write_tokenizer(path, **arguments)
        return TextTokenizer.open(path, pad_token)

    with pytest.raises(RequestError, match=r"no padding token; legal: text\.pad_token, for example '<\|end\|>'"):
        opened("no-pad", pad=False)
    assert opened("named", "<|end|>", pad=False).base(400).pad == 2
    with pytest.raises(RequestError, match=r"text\.pad_token: '<x>'"):
        opened("unknown", "<x>", pad=False)
    with pytest.raises(RequestError, match="no end token"):
        opened("no-end", end=False)
    with pytest.raises(RequestError, match=r"text\.form: chat, .* has no chat template; legal: plain"):
        PromptTemplate(TextSettings(items="codes"), opened("no-chat", chat=False))
    with pytest.raises(RequestError, match="330 tokens for a model of 300 rows"):
        opened("rows").base(300)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"tokenizer of .*empty: none; legal: a folder with tokenizer\.json"):
        TextTokenizer.open(tmp_path / "empty")


def test_code_tokens_that_are_there_already_are_refused(folder: Path) -> None:
    first = make(folder)
    first.tokenizer.extend(first.catalogue.vocabulary)  # the same again changes nothing
    grown = code_catalogue(Catalogue.from_codes([[0, 1, 2]], ["x"]), first.tokenizer.base(400))
    with pytest.raises(RequestError, match=r"<a_0> is token 330 already"):
        first.tokenizer.extend(grown.vocabulary)


def test_titles_have_no_codes() -> None:
    with pytest.raises(ValueError, match="legal: titles where items are titles"):
        TextSettings(items=ItemForm.TITLES, history=ItemForm.CODES)
    with pytest.raises(ValueError, match="legal: next_item alone"):
        TextSettings(items=ItemForm.TITLES, tasks={"title_to_code": 1.0})
    with pytest.raises(ValueError, match="no task has a weight"):
        TextSettings(items=ItemForm.CODES, tasks={"next_item": 0.0})
