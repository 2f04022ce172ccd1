"""Both engines decode the policy of the model on disk: real vLLM and plain transformers, in float32 and bfloat16.

The oracle is transformers in float64, unbatched, one prefix at a time, without a cache. Checked: beams, the exhaustive
ranking, samples by chi-square, behaviour log-probabilities, exclusions, empty slots, unconstrained decoding, `score`,
equal bits whatever the chunking, the limits of the cache, refused requests. Not here: the loop itself over odd
catalogues (test_decoding.py), the fleet (test_fleet.py), pushes (test_channel.py).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.records import NO_ITEM, Decode, DecodeSpec, Finish, Groups, Prompt
from rollout import vllm_forward, vllm_internals
from rollout.engine import Engine, build_engine
from rollout.paging import WaveLimits
from rollout.receiving import IN_TRANSIT
from rollout.settings import EngineKind, HeadRows, RolloutSettings
from tests.rollout.oracles import NextLogits, all_items, allowed_paths, beam_search
from tests.tiny_model import random_prompts

LENGTHS = [5, 1, 31, 32, 33, 64, 70]
"""Prompt lengths around the block size, 32."""
BEAM = DecodeSpec(decode=Decode.BEAM, width=8)
PolicyOracle = Callable[[Prompt], NextLogits]


@pytest.fixture(scope="module")
def oracle(hf_dir: Path) -> PolicyOracle:
    """Logits of transformers in float64 after a prompt and a prefix."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).double().eval()
    known: dict[tuple[int, ...], np.ndarray] = {}

    def after(prompt: Prompt) -> NextLogits:
        def logits(prefix: tuple[int, ...]) -> np.ndarray:
            tokens = (*prompt.token_ids.tolist(), *prefix)
            if tokens not in known:
                with torch.no_grad():
                    known[tokens] = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()
            return known[tokens]

        return logits

    return after


def paths_of(groups: Groups, row: int) -> list[tuple[int, ...]]:
    return [tuple(tokens) for tokens in groups.token_PGT[row][groups.valid_PG[row]].tolist()]


def same_bits(one: Groups, other: Groups) -> bool:
    fields = ("token_PGT", "length_PG", "item_PG", "valid_PG", "logp_PGT")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_beams_equal_the_float64_search(
    engine: Engine, catalogue: Catalogue, oracle: PolicyOracle, temperature: float
) -> None:
    prompts = random_prompts(catalogue, LENGTHS, excluded=10)
    groups = engine.generate(prompts, dataclasses.replace(BEAM, temperature=temperature))
    for row, prompt in enumerate(prompts):
        allowed = allowed_paths(catalogue, prompt.exclusions)
        expected = beam_search(oracle(prompt), allowed, BEAM.width, temperature)
        assert paths_of(groups, row) == [path for path, _ in expected]
        np.testing.assert_allclose(groups.sequence_logp_PG[row], [score for _, score in expected], atol=1e-4)
        assert groups.item_PG[row].tolist() == [allowed[path] for path, _ in expected]
    assert (groups.finish_PG == Finish.ITEM).all()
    assert groups.constraint == "item_trie-exclusions"
    assert groups.catalogue_digest == catalogue.digest
    assert groups.prompt_id_P.tolist() == list(range(len(prompts)))


def test_a_width_over_the_catalogue_ranks_it_and_leaves_slots_empty(
    engine: Engine, catalogue: Catalogue, oracle: PolicyOracle
) -> None:
    prompts = random_prompts(catalogue, [33, 7], seed=1)
    groups = engine.generate(prompts, dataclasses.replace(BEAM, width=64))
    for row, prompt in enumerate(prompts):
        expected = all_items(oracle(prompt), allowed_paths(catalogue))
        assert paths_of(groups, row) == [path for path, _ in expected]
    assert groups.valid_PG.sum(1).tolist() == [60, 60]
    assert (groups.finish_PG[:, 60:] == Finish.ABSENT).all()
    assert (groups.item_PG[:, 60:] == NO_ITEM).all()
    assert (groups.token_PGT[:, 60:] == -1).all()
    assert (groups.logp_PGT[:, 60:] == 0).all()


def test_fewer_permitted_items_than_beams(engine: Engine, catalogue: Catalogue) -> None:
    prompt, other = random_prompts(catalogue, [20, 20], seed=2)
    left = {3, 17, 44}
    banned = np.array([item for item in range(catalogue.n_items) if item not in left], np.int32)
    groups = engine.generate([dataclasses.replace(prompt, exclusions=banned), other], BEAM)
    assert set(groups.item_PG[0][groups.valid_PG[0]].tolist()) == left
    assert groups.valid_PG.sum(1).tolist() == [3, 8]


def test_samples_follow_the_exact_distribution(engine: Engine, catalogue: Catalogue, oracle: PolicyOracle) -> None:
    (prompt,) = random_prompts(catalogue, [40], seed=3, excluded=20)
    prompts = [dataclasses.replace(prompt, prompt_id=row) for row in range(60)]
    groups = engine.generate(prompts, DecodeSpec(decode=Decode.SAMPLE, width=64, temperature=1.3, seed=9, step=4))
    allowed = allowed_paths(catalogue, prompt.exclusions)
    exact = all_items(oracle(prompt), allowed, 1.3)
    counts = np.bincount(groups.item_PG.ravel(), minlength=catalogue.n_items)
    expected = np.zeros(catalogue.n_items)
    for path, logp in exact:
        expected[allowed[path]] = np.exp(logp) * groups.item_PG.size
    assert counts.sum() == counts[expected > 0].sum()
    rare = (expected > 0) & (expected < 8)
    often = expected >= 8
    observed = np.append(counts[often], counts[rare].sum())
    wanted = np.append(expected[often], expected[rare].sum())
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3
    by_path = dict(exact)
    for path, logp in zip(paths_of(groups, 0), groups.sequence_logp_PG[0], strict=True):
        assert logp == pytest.approx(by_path[path], abs=1e-4)


def test_draws_without_replacement_differ_and_carry_weights(
    engine: Engine, catalogue: Catalogue, oracle: PolicyOracle
) -> None:
    prompts = random_prompts(catalogue, [40, 9], seed=13, excluded=20)
    groups = engine.generate(prompts, DecodeSpec(decode=Decode.SAMPLE_WITHOUT_REPLACEMENT, width=8, seed=5))
    assert groups.threshold_P is not None
    for row, prompt in enumerate(prompts):
        exact = dict(all_items(oracle(prompt), allowed_paths(catalogue, prompt.exclusions)))
        paths = paths_of(groups, row)
        assert len(set(paths)) == 8
        logp_G = np.array([exact[path] for path in paths])
        np.testing.assert_allclose(groups.sequence_logp_PG[row], logp_G, atol=1e-4)
        inclusion_G = 1 - np.exp(-np.exp(logp_G - groups.threshold_P[row]))
        np.testing.assert_allclose(groups.importance_weight_PG[row], np.exp(logp_G) / inclusion_G, rtol=1e-3)


@pytest.mark.parametrize("decode", list(Decode))
def test_given_items_are_scored_in_the_same_prefill(
    engine: Engine, catalogue: Catalogue, oracle: PolicyOracle, decode: Decode
) -> None:
    """More items than the group is wide, different numbers of them, one that is excluded, one given twice."""
    plain = random_prompts(catalogue, [33, 5, 64, 20], seed=14, excluded=6)
    spec = DecodeSpec(decode=decode, width=2, temperature=0.7, seed=1)
    free = [np.setdiff1d(np.arange(catalogue.n_items), prompt.exclusions) for prompt in plain]
    items = [(*free[0][[3, 9, 3, 20]],), (), (int(plain[2].exclusions[0]), *free[2][:1]), (*free[3][-1:],)]
    prompts = [
        dataclasses.replace(prompt, scored_items=tuple(map(int, given)))
        for prompt, given in zip(plain, items, strict=True)
    ]
    groups = engine.generate(prompts, spec)
    assert same_bits(groups, engine.generate(plain, spec))
    assert groups.scored_logp_PMT is not None
    assert groups.scored_logp_PMT.shape == (4, 4, 3)
    for row, prompt in enumerate(prompts):
        exact = dict(all_items(oracle(prompt), allowed_paths(catalogue, prompt.exclusions), 0.7))
        paths = {item: path for path, item in allowed_paths(catalogue).items()}
        for member in range(4):
            logp_T = groups.scored_logp_PMT[row, member]
            if member >= len(prompt.scored_items):
                assert (logp_T == 0).all()
            elif prompt.scored_items[member] in prompt.exclusions:
                assert logp_T.sum() == -np.inf
            else:
                assert logp_T.sum() == pytest.approx(exact[paths[prompt.scored_items[member]]], abs=1e-4)
    halves = Groups.concat([groups.take(np.array([0, 2])), engine.generate(prompts[1:2], spec)])
    assert halves.scored_logp_PMT is not None
    assert halves.scored_logp_PMT.shape == (3, 4, 3)


def test_unconstrained_beams(engine: Engine, catalogue: Catalogue, oracle: PolicyOracle) -> None:
    prompts = random_prompts(catalogue, [33, 12], seed=4, excluded=5)
    groups = engine.generate(prompts, dataclasses.replace(BEAM, constrained=False))
    size = catalogue.vocabulary.size
    free = {(a, b, c): -1 for a in range(size) for b in range(size) for c in range(size)}
    items = allowed_paths(catalogue)
    for row, prompt in enumerate(prompts):
        logits = oracle(prompt)
        for path, logp_T in zip(paths_of(groups, row), groups.logp_PGT[row], strict=True):
            expected = [
                torch.from_numpy(logits(path[:depth])).log_softmax(0)[token].item() for depth, token in enumerate(path)
            ]
            np.testing.assert_allclose(logp_T, expected, atol=1e-4)
        assert groups.item_PG[row].tolist() == [items.get(path, NO_ITEM) for path in paths_of(groups, row)]
    assert beam_search(oracle(prompts[1]), free, 3)[0][0] == paths_of(groups, 1)[0]
    assert set(np.unique(groups.finish_PG)) <= {Finish.ITEM.value, Finish.LENGTH.value}
    assert groups.constraint == "unconstrained"


def test_score_is_the_full_vocabulary(engine: Engine, catalogue: Catalogue, oracle: PolicyOracle) -> None:
    prompts = random_prompts(catalogue, LENGTHS, seed=5)
    rng = np.random.default_rng(0)
    completions = [rng.integers(0, catalogue.vocabulary.size, 1 + row).astype(np.int32) for row in range(len(prompts))]
    scores = engine.score([prompt.token_ids for prompt in prompts], completions)
    for prompt, completion, logp_T in zip(prompts, completions, scores, strict=True):
        assert logp_T.dtype == np.float32
        tokens = tuple(completion.tolist())
        logits = oracle(prompt)
        expected = [torch.from_numpy(logits(tokens[:t])).log_softmax(0)[token].item() for t, token in enumerate(tokens)]
        np.testing.assert_allclose(logp_T, expected, atol=1e-4)


@pytest.mark.parametrize("decode", list(Decode))
def test_equal_bits_alone_and_together(engine: Engine, catalogue: Catalogue, decode: Decode) -> None:
    prompts = random_prompts(catalogue, LENGTHS, seed=6, excluded=3)
    spec = DecodeSpec(decode=decode, width=8, seed=2)
    together = engine.generate(prompts, spec)
    alone = [engine.generate([prompt], spec) for prompt in reversed(prompts)]
    assert same_bits(together, Groups.concat(alone[::-1]))


def test_equal_bits_whatever_the_chunks(
    vllm_engine: Any, catalogue: Catalogue, hf_dir: Path, vllm_settings: RolloutSettings
) -> None:
    prompts = random_prompts(catalogue, [*LENGTHS, 100, 3], seed=7, excluded=3)
    texts = [prompt.token_ids for prompt in prompts]
    specs = [DecodeSpec(decode=decode, width=8, seed=2) for decode in Decode]
    whole = [vllm_engine.generate(prompts, spec) for spec in specs]
    scores = vllm_engine.score(texts, texts)
    try:
        for change in ({"prompts_per_forward": 1}, {"prompts_per_forward": 3}, {"tokens_per_forward": 90}):
            vllm_engine._rpc("windlass_open", str(hf_dir), vllm_settings.model_copy(update=change))
            assert all(
                same_bits(vllm_engine.generate(prompts, spec), expected)
                for spec, expected in zip(specs, whole, strict=True)
            )
            again = vllm_engine.score(texts, texts)
            assert all(np.array_equal(one, other) for one, other in zip(again, scores, strict=True))
    finally:
        vllm_engine._rpc("windlass_open", str(hf_dir), vllm_settings)


@pytest.mark.parametrize("decode", list(Decode))
def test_the_rows_of_the_level_give_the_same_completions(
    vllm_engine: Any, catalogue: Catalogue, hf_dir: Path, vllm_settings: RolloutSettings, decode: Decode
) -> None:
    prompts = random_prompts(catalogue, LENGTHS, seed=12, excluded=3)
    spec = DecodeSpec(decode=decode, width=8, seed=2)
    whole = vllm_engine.generate(prompts, spec)
    try:
        vllm_engine._rpc("windlass_open", str(hf_dir), vllm_settings.model_copy(update={"head": HeadRows.LEVEL}))
        levels = vllm_engine.generate(prompts, spec)
        assert np.array_equal(levels.token_PGT, whole.token_PGT)
        np.testing.assert_allclose(levels.logp_PGT, whole.logp_PGT, atol=1e-5)
        alone = [vllm_engine.generate([prompt], spec) for prompt in prompts]
        assert same_bits(levels, Groups.concat(alone))
        backend = worker_of(vllm_engine).windlass_backend
        level_V = catalogue.trie().level_tokens(1)
        assert backend.prefill([prompt.token_ids for prompt in prompts], 1, 1, level_V).shape == (7, len(level_V))
        backend.release()
    finally:
        vllm_engine._rpc("windlass_open", str(hf_dir), vllm_settings)


@pytest.mark.parametrize("kind", ["reference", "vllm"])
@pytest.mark.parametrize("decode", list(Decode))
def test_paths_of_unequal_length(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    hf_dir: Path,
    vllm_settings: RolloutSettings,
    kind: str,
    decode: Decode,
) -> None:
    """Some beams are complete while others grow, so some prompts have no row left at a level."""
    codes = [[0], [1, 0], [1, 1, 0], [1, 1, 1], [2, 0, 0], [2, 0, 1], [2, 1, 0], [2, 1, 1], [3, 2], [3, 1, 1, 0]]
    uneven = Catalogue.from_codes(codes)
    folder = tmp_path / "uneven"
    shutil.copytree(hf_dir, folder)
    uneven.save(folder / "catalogue")
    prompts = random_prompts(uneven, [33, 7, 50], seed=16, first_id=1)
    left = [{0, 8}, {1, 9}, set(range(10))]
    prompts = [
        dataclasses.replace(prompt, exclusions=np.array(sorted(set(range(10)) - kept), np.int32))
        for prompt, kept in zip(prompts, left, strict=True)
    ]
    oracle = request.getfixturevalue("oracle")
    spec = DecodeSpec(decode=decode, width=6, seed=4)
    if kind == "reference":
        engine: Any = build_engine(vllm_settings.model_copy(update={"engine": EngineKind.REFERENCE}), folder)
        groups = engine.generate(prompts, spec)
    else:
        engine = request.getfixturevalue("vllm_engine")
        engine._rpc("windlass_open", str(folder), vllm_settings)
        try:
            groups = engine.generate(prompts, spec)
            assert same_bits(
                groups, Groups.concat([engine.generate([prompt], spec, exclude=True) for prompt in prompts])
            )
        finally:
            engine._rpc("windlass_open", str(hf_dir), vllm_settings)
    for row, prompt in enumerate(prompts):
        allowed = allowed_paths(uneven, prompt.exclusions)
        exact = dict(all_items(oracle(prompt), allowed))
        found = [path[:n] for path, n in zip(paths_of(groups, row), groups.length_PG[row], strict=False)]
        np.testing.assert_allclose(
            groups.sequence_logp_PG[row][: len(found)], [exact[path] for path in found], atol=1e-4
        )
        if decode is Decode.BEAM:
            assert found == [path for path, _ in beam_search(oracle(prompt), allowed, 6, 1.0)]
        if decode is not Decode.SAMPLE:
            assert len(set(found)) == len(found) == min(6, len(left[row]))


def test_a_dead_end_is_an_error_and_nothing_else(engine: Engine, catalogue: Catalogue) -> None:
    prompt, other = random_prompts(catalogue, [20, 30], seed=15)
    whole = engine.generate([other], BEAM)
    dead = dataclasses.replace(prompt, exclusions=np.arange(catalogue.n_items, dtype=np.int32))
    with pytest.raises(RunError, match="prompt 0 of the batch: every item of the catalogue is excluded"):
        engine.generate([dead, other], BEAM)
    assert same_bits(engine.generate([other], BEAM), whole)


def worker_of(vllm_engine: Any) -> Any:
    return vllm_engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_the_memory_bounds_the_waves(vllm_engine: Any, catalogue: Catalogue) -> None:
    prompts = random_prompts(catalogue, LENGTHS, seed=8)
    roomy = vllm_engine.generate(prompts, BEAM)
    backend = worker_of(vllm_engine).windlass_backend
    limits = backend.limits
    try:
        # The longest prompt has 70 tokens, and each of its 8 beams keeps 2.
        for tokens, rows, fits in ((86, 10**6, True), (85, 10**6, False), (10**6, 8, True), (10**6, 17, True)):
            backend.limits = WaveLimits(tokens=tokens, rows=rows)
            if fits:
                assert same_bits(vllm_engine.generate(prompts, BEAM), roomy)
            else:
                with pytest.raises(RequestError, match=r"rollout\.kv_cache_gib.*at least 86 tokens"):
                    vllm_engine.generate(prompts, BEAM)
    finally:
        backend.limits = limits


def test_attention_that_is_more_than_a_softmax_of_products_is_refused(vllm_engine: Any) -> None:
    runner = worker_of(vllm_engine).model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context
    name, layer = next(iter(layers.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.impl, "logits_soft_cap", 30.0)
        with pytest.raises(RequestError, match=f"layer {name} of the model: capped scores; legal:.*reference engine"):
            vllm_forward.view(runner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(layers, name, SimpleNamespace(kv_cache=layer.kv_cache))
        with pytest.raises(RequestError, match=f"layer {name} of the model: SimpleNamespace"):
            vllm_forward.view(runner)


def test_requests_of_vllm_itself_stay_right(vllm_engine: Any, catalogue: Catalogue, oracle: PolicyOracle) -> None:
    """Also those that find their prefix in vLLM's cache, where a rollout has been in between."""
    from vllm import SamplingParams

    prompts = random_prompts(catalogue, [70, 64, 33], seed=10)
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=1, detokenize=False)
    inputs = [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in prompts]
    worker = worker_of(vllm_engine)
    assert worker.model_runner.vllm_config.cache_config.enable_prefix_caching
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    first = vllm_engine._llm.generate(inputs, params, use_tqdm=False)
    before = {name: layer.kv_cache.clone() for name, layer in layers.items()}
    vllm_engine.generate(random_prompts(catalogue, LENGTHS, seed=11), BEAM)
    vllm_engine.score([prompt.token_ids for prompt in prompts], [prompt.token_ids for prompt in prompts])
    assert all(torch.equal(layer.kv_cache, before[name]) for name, layer in layers.items())
    again = vllm_engine._llm.generate(inputs, params, use_tqdm=False)
    assert [out.num_cached_tokens for out in again] == [64, 32, 32]
    for prompt, one, other in zip(prompts, first, again, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        tokens = tuple(other.outputs[0].token_ids)
        for t, entry in enumerate(other.outputs[0].logprobs):
            expected = torch.from_numpy(oracle(prompt)(tokens[:t])).log_softmax(0)
            assert tokens[t] == int(expected.argmax())
            assert entry[tokens[t]].logprob == pytest.approx(expected.max().item(), abs=1e-4)


def test_wrong_requests_are_named(engine: Engine, catalogue: Catalogue) -> None:
    (prompt,) = random_prompts(catalogue, [10], first_id=77)
    empty = np.empty(0, np.int32)

    def refused(match: str, prompts: list[Prompt], spec: DecodeSpec = BEAM) -> None:
        with pytest.raises(RequestError, match=match):
            engine.generate(prompts, spec)

    refused("prompts: none", [])
    refused("prompt 77: 0 tokens; legal: 1 to 509", [dataclasses.replace(prompt, token_ids=empty)])
    refused("prompt 77: 510 tokens", [dataclasses.replace(prompt, token_ids=np.full(510, 5, np.int32))])
    refused("prompt 77: token ids", [dataclasses.replace(prompt, token_ids=np.array([1, 19], np.int32))])
    refused("prompt 77: token ids", [dataclasses.replace(prompt, token_ids=np.array([-1], np.int32))])
    free = dataclasses.replace(BEAM, decode=Decode.SAMPLE_WITHOUT_REPLACEMENT, constrained=False)
    refused("without the constraint; legal: beam, sample", [prompt], free)
    refused("prompt 77, scored_items: 60", [dataclasses.replace(prompt, scored_items=(3, 60))])
    refused("both above 0", [prompt], dataclasses.replace(BEAM, temperature=0.0))
    with pytest.raises(RequestError, match="sequence 0"):
        engine.score([prompt.token_ids], [empty])
    longest = dataclasses.replace(prompt, token_ids=np.full(509, 5, np.int32))
    assert engine.generate([longest], BEAM).valid_PG.all()


def test_no_generation_while_weights_are_in_transit(engine: Any, catalogue: Catalogue) -> None:
    version = engine.weight_version
    engine.weight_version = IN_TRANSIT
    try:
        with pytest.raises(RunError, match="in transit"):
            engine.generate(random_prompts(catalogue, [5]), BEAM)
    finally:
        engine.weight_version = version


def test_every_name_of_vllm_that_we_touch_exists(vllm_engine: Any) -> None:
    import vllm

    assert vllm.__version__.split("+")[0] == vllm_internals.VLLM_VERSION
    assert vllm_internals.missing_names() == []
    worker = worker_of(vllm_engine)
    assert [name for name in vllm_internals.RUNNER_ATTRIBUTES if name not in vars(worker.model_runner)] == []
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    for group in worker.windlass_view.groups:
        for layer in group.layers.values():
            assert all(name in vars(layers[layer]) for name in vllm_internals.LAYER_ATTRIBUTES)


def test_no_other_file_names_vllm_internals() -> None:
    root = Path(vllm_internals.__file__).parents[1]
    public = ("LLM", "SamplingParams")
    allowed = {"import vllm", "from vllm.sampling_params import BeamSearchParams"}
    allowed |= {f"from vllm import {name}" for name in public}
    for folder in ("data", "rollout", "reward", "trainer", "launch"):
        for path in (root / folder).glob("**/*.py"):
            if path.name in ("vllm_internals.py", "vllm_forward.py"):
                continue
            lines = [line.strip() for line in path.read_text().splitlines()]
            found = [line for line in lines if line.startswith(("import vllm", "from vllm"))]
            assert set(found) <= allowed, path
