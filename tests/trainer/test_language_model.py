"""Contract: a pretrained language model of any family starts a run with its own rows bit for bit, rows for codes, and
tokenizer, catalogue and weights of one size; the learner's tree pass computes what transformers computes; the engine
generates items of it, and masks the ids that no token has.

Families are tiny random models. Not checked here: vLLM (tests/launch/test_language_job.py trains through it) and
pretrained weights (docs/results/llm.json).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.catalogue import Catalogue
from data.codes import Codes
from data.dataset import Dataset
from data.errors import RequestError
from data.records import NO_ITEM, Decode, DecodeSpec
from data.settings_data import PromptSettings
from data.text_items import code_catalogue
from data.text_prompts import TextPromptBuilder
from data.text_settings import TextSettings
from rollout.engine import build_engine
from rollout.settings import RolloutSettings
from tests.small_world import recipe, write_dataset
from tests.tiny_language import FAMILIES, write_language
from trainer.initial_model import check_fits, own_initial_model
from trainer.jobs import SftJob
from trainer.language_model import Language, content_rows
from trainer.model_growth import grow_model, has_grown
from trainer.policy import Policy, full_log_probabilities, load_language_model
from trainer.policy_data import PolicyData
from trainer.policy_jobs import windows
from trainer.prompt_card import PromptCard
from trainer.trees import Completions, completion_pieces, lay_out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        write_language(folder / family, family)
    return folder


def start(base: Path, dataset: Dataset, target: Path, **text: Any) -> tuple[Language, Path]:
    settings = TextSettings(**({"items": "codes"} | text))
    language = Language.open(str(base), settings, dataset, "default")
    folder = own_initial_model(
        str(base),
        language.catalogue,
        seed=1,
        dtype=torch.float32,
        target=target,
        resumed=False,
        language=(language, settings),
    )
    return language, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    language, folder = start(bases / family, dataset, tmp_path / "initial")
    vocabulary = language.catalogue.vocabulary
    before = AutoModelForCausalLM.from_pretrained(bases / family)
    after = AutoModelForCausalLM.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocabulary.size
    assert vocabulary.text is not None
    for old, new in (
        (before.get_input_embeddings().weight, after.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, after.get_output_embeddings().weight),
    ):
        own = vocabulary.text.tokens
        assert new.shape[0] == vocabulary.size
        assert torch.equal(old[:own], new[:own])
        rows, mean = new[vocabulary.first_code : vocabulary.tokens], old[:own].mean(0)
        assert 0 < (rows - mean).std().item() < 0.2 * (old[:own] - mean).std().item()
        assert len(torch.unique(rows, dim=0)) == len(rows)
        assert torch.allclose(new[vocabulary.tokens :], mean, atol=1e-6)
    saved = AutoTokenizer.from_pretrained(folder)
    assert len(saved) == vocabulary.tokens
    assert saved.convert_tokens_to_ids("<b_7>") == vocabulary.code_token(1, 7)
    check_fits(folder, language.catalogue)
    _tree_pass_is_plain(folder, language)


@torch.no_grad()
def _tree_pass_is_plain(folder: Path, language: Language) -> None:
    rng = np.random.default_rng(0)
    catalogue = language.catalogue
    contexts = [rng.integers(3, 300, length).astype(np.int32) for length in (5, 23, 40)]
    prompts = [context for context in contexts for _ in range(3)]
    answers = [catalogue.tokens(int(item)) for item in rng.integers(0, catalogue.n_items, 9)]
    completions = Completions.of_sequences(prompts, answers)
    batch = lay_out(completion_pieces(completions, 64))
    logp_PGT = np.zeros(completions.shape, dtype=np.float32)
    found = full_log_probabilities(Policy(load_language_model(folder, torch.float32))(batch), batch)
    logp_PGT.reshape(-1)[batch.slot_K.numpy()] = found.numpy()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        logp_TV = plain(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp_TV.gather(1, ids[len(prompt) :, None])[:, 0].numpy()
        member = completions.valid_PG.nonzero()
        assert np.abs(logp_PGT[member[0][row], member[1][row], : len(answer)] - expected).max() < 2e-5


def test_content_is_the_mean_of_the_titles(bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    language, folder = start(bases / "llama", dataset, tmp_path / "initial", code_init="content", init_noise=0.0)
    catalogue = language.catalogue
    own = AutoModelForCausalLM.from_pretrained(bases / "llama").get_input_embeddings().weight.detach()
    rows = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    token = catalogue.vocabulary.code_token(1, 3)
    having = [item for item in range(catalogue.n_items) if token in catalogue.tokens(item)]
    titles = [own[torch.tensor(language.tokenizer.encode(catalogue.titles[item]))].mean(0) for item in having]
    assert len(having) == 6
    assert torch.allclose(rows[token], torch.stack(titles).mean(0), atol=1e-6)
    assert set(content_rows(own, language)) == set(range(330, 344))


@pytest.mark.parametrize("items", ["codes", "titles"])
def test_items_are_generated_from_prompts(items: str, bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    settings = TextSettings(items=items, form="plain")
    language, folder = start(bases / "smollm", dataset, tmp_path / "initial", items=items, form="plain")
    builder = TextPromptBuilder(language.catalogue, 4, True, 200, settings=settings, tokenizer=language.tokenizer)
    prompts = builder.build(dataset.samples("valid"), np.arange(4)).prompts
    engine = build_engine(RolloutSettings(engine="reference", dtype="float32"), folder)
    groups = engine.generate(prompts, DecodeSpec(decode=Decode.BEAM, width=48))
    for row, prompt in enumerate(prompts):
        # Beams over the whole catalogue find every item once but those of the history, whatever their length.
        found = groups.item_PG[row][groups.valid_PG[row]].tolist()
        assert sorted(found) == sorted(set(range(48)) - set(prompt.exclusions.tolist()))
        for member, item in enumerate(found):
            length = int(groups.length_PG[row, member])
            assert groups.token_PGT[row, member, :length].tolist() == language.catalogue.tokens(item).tolist()
    free = engine.generate(prompts, DecodeSpec(decode=Decode.SAMPLE, width=64, constrained=False, max_tokens=6))
    assert int(free.token_PGT.max()) < language.catalogue.vocabulary.tokens
    assert (free.item_PG == NO_ITEM).any()


def test_a_continued_model_keeps_its_tokens(bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    language, folder = start(bases / "gemma", dataset, tmp_path / "initial")
    again = Language.open(str(folder), TextSettings(items="codes"), dataset, "default")
    assert again.extended
    assert again.catalogue.digest == language.catalogue.digest
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    Catalogue.build(dataset, "default").save(plain / "catalogue")
    with pytest.raises(RequestError, match=r"init: .* is no language model; legal: text\.items: null"):
        Language.open(str(plain), TextSettings(items="codes"), dataset, "default")


def test_a_folder_says_how_its_prompts_are_written(bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    """What serving, simulation and evaluation read: the card and the tokenizer of a checkpoint's folder."""
    text = TextSettings(items="codes", history="codes", form="plain", instruction="Next?")
    language, folder = start(bases / "smollm", dataset, tmp_path / "initial")
    shown = PromptSettings(dataset=dataset.path, history=4, max_prompt_tokens=120)
    PromptCard.of(shown, text=text).write(folder)
    own = TextPromptBuilder(language.catalogue, 4, True, 120, settings=text, tokenizer=language.tokenizer)
    read = PromptCard.read(folder).builder(Catalogue.load(folder / "catalogue"), folder)
    history = np.array([3, 1, 40], dtype=np.int32)
    assert read.prompt(history)[0].token_ids.tolist() == own.prompt(history)[0].token_ids.tolist()
    assert language.tokenizer.decode(read.prompt(history)[0].token_ids.tolist()).startswith("Next?\n- <a_0><b_3>\n")


@pytest.mark.parametrize("more", [2, 60])
def test_a_language_model_follows_its_catalogue(more: int, bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    """New codes take free rows of the matrices, or further ones; tokenizer and rows of old tokens stay."""
    language, folder = start(bases / "llama", dataset, tmp_path / "initial")
    own = language.catalogue
    plain = Catalogue.build(dataset, "default")
    paths = [[item // 8, item % 8] for item in range(48)] + [[5, 8 + code] for code in range(more)]
    grown_codes = Codes.from_lists(paths, [plain.vocabulary.level_sizes[0], 8 + more])
    assert own.vocabulary.text is not None
    keys = [*own.item_keys, *(f"new-{n}" for n in range(more))]
    later = Catalogue.from_codes(grown_codes, [*own.titles, *keys[48:]], item_keys=keys)
    later = code_catalogue(later, own.vocabulary.text)
    assert has_grown(folder, later)
    target = grow_model(folder, later, tmp_path / "grown", seed=0)
    check_fits(target, later)
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, target))
    known = own.vocabulary.tokens
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, part)().weight, getattr(new, part)().weight
        assert len(after) == (384 if more == 2 else 448)
        assert torch.equal(after[:known], before[:known])
        assert len(torch.unique(after[known : known + more], dim=0)) == more
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert len(tokenizer) == later.vocabulary.tokens
    assert tokenizer("item<b_9>").input_ids[-1] == later.vocabulary.code_token(1, 9)


def test_titles_follow_their_catalogue(bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    """An item that is retired, and one that is new, change no weight: titles need no rows."""
    language, folder = start(bases / "llama", dataset, tmp_path / "initial", items="titles")
    own = language.catalogue
    assert not has_grown(folder, own)
    path = np.array(language.tokenizer.encode("Solaris"), np.int32)
    later = dataclasses.replace(
        own.retire([3]),
        path_values=np.concatenate([own.path_values, path]),
        path_start=np.append(own.path_start, own.path_start[-1] + len(path)),
        active=np.append(own.retire([3]).active, True),
        titles=(*own.titles, "Solaris"),
        item_keys=(*own.item_keys, "solaris"),
    )
    assert has_grown(folder, later)
    target = grow_model(folder, later, tmp_path / "grown", seed=0)
    check_fits(target, later)
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, target))
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    with pytest.raises(RequestError, match="an earlier state of"):
        has_grown(target, own)


def test_a_job_of_codes_says_what_a_language_model_needs(bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    for items in ("codes", "titles"):
        _, folder = start(bases / "llama", dataset, tmp_path / items, items=items)
        with pytest.raises(RequestError, match=rf"text\.items: null; legal: {items}: .* is a language model"):
            check_fits(folder, Catalogue.build(dataset, "default"))


@pytest.mark.parametrize(
    ("removed", "message"),
    [("tokenizer.json", "tokenizer of .*: (none|cannot be read)"), ("model.safetensors", r"init: .*safetensors")],
)
def test_folders_that_lack_something(removed: str, message: str, bases: Path, dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(bases / "llama", tmp_path / "base")
    (tmp_path / "base" / removed).unlink()
    with pytest.raises(RequestError, match=message):
        start(tmp_path / "base", dataset, tmp_path / "initial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "tiny"}, r"init: tiny; legal: the folder or GGUF file"),
        ({"init": "no.gguf"}, r"init: no file no\.gguf"),
        ({"learner": {"row_tokens": 208}}, r"learner\.row_tokens: 208; legal: at least 2\d\d \(prompt, answer"),
    ],
)
def test_jobs_are_checked(changes: dict[str, Any], message: str, bases: Path, dataset: Dataset) -> None:
    sections: dict[str, Any] = {
        "init": str(bases / "llama"),
        "text": {"items": "codes", "tasks": {"code_to_title": 1.0}},
        "data": {"max_prompt_tokens": 205},
        "learner": {"row_tokens": 512, "token_budget": 1024},
        "rollout": {"max_model_len": 512},
    }
    for name, value in changes.items():
        sections[name] = {**sections[name], **value} if isinstance(value, dict) else value

    def opened() -> None:
        job = SftJob(**{k: v for k, v in recipe(dataset.path, "sft", **sections).items() if k != "job"})
        windows(job, PolicyData.open(job), None)

    with pytest.raises(RequestError, match=message):
        opened()
