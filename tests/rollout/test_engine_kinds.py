"""Models and layouts that the shared engines do not have: sliding windows, an adapter, two workers.

The oracle is transformers in float64, one prefix at a time, without a cache. vLLM runs in a process of its own,
because an engine holds the process group. Not here: what every engine has to do (test_engines.py).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.errors import RequestError
from data.records import Decode, DecodeSpec, Groups, Prompt
from rollout.engine import build_engine, served_cache_bytes
from rollout.settings import EngineKind, RolloutSettings
from tests.requirements import require
from tests.rollout.oracles import allowed_paths, beam_search
from tests.tiny_model import random_prompts, write_tiny_model

WINDOW = 8
LENGTHS = [1, 6, 7, 8, 9, 33, 70]
"""Around the window, and around the block size of 32."""
SETTINGS = RolloutSettings(dtype="float32", width=8, kv_cache_gib=0.125, threads=1)
BEAM = DecodeSpec(decode=Decode.BEAM, width=8)


def write_windowed_model(folder: Path, catalogue: Catalogue, kind: str) -> Any:
    """A tiny random model with windows on some layers (Gemma 3) or all (Mistral), also returned."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": catalogue.vocabulary.size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "sliding_window": WINDOW,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        config: Any = transformers.Gemma3TextConfig(**shape, layer_types=layers, query_pre_attn_scalar=32)
        model: Any = transformers.Gemma3ForCausalLM(config)
    else:
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    catalogue.vocabulary.save_tokenizer(folder)
    catalogue.save(folder / "catalogue")
    return model.double().eval()


def check_beams(model: Any, catalogue: Catalogue, prompts: list[Prompt], groups: Groups) -> None:
    def logits(tokens: list[int], prefix: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model(torch.tensor([[*tokens, *prefix]]), use_cache=False).logits[0, -1].numpy()
        return found

    for row, prompt in enumerate(prompts):
        after = partial(logits, prompt.token_ids.tolist())
        expected = beam_search(after, allowed_paths(catalogue, prompt.exclusions), BEAM.width, 1.0)
        assert [tuple(path) for path in groups.token_PGT[row].tolist()] == [path for path, _ in expected]
        np.testing.assert_allclose(groups.sequence_logp_PG[row], [score for _, score in expected], atol=1e-4)


def generate_elsewhere(folder: Path, settings: RolloutSettings, prompts: list[Prompt], specs: list[DecodeSpec]) -> Any:
    """Groups of every request, from a vLLM engine in a process of its own; every worker's groups have to be equal."""
    path = folder / "request.pickle"
    path.write_bytes(pickle.dumps((settings, prompts, specs)))
    # Own session and no Ray: the child must not see the process group of this process.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.rollout.test_engine_kinds", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads((folder / "answer.pickle").read_bytes())


def main(folder: Path) -> None:
    settings, prompts, specs = pickle.loads((folder / "request.pickle").read_bytes())
    engine = build_engine(settings, folder)
    answers = [engine.generate(prompts, spec) for spec in specs]
    engine.close()
    (folder / "answer.pickle").write_bytes(pickle.dumps(answers))


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_windows_in_the_reference_engine(tmp_path: Path, catalogue: Catalogue, kind: str) -> None:
    model = write_windowed_model(tmp_path, catalogue, kind)
    prompts = random_prompts(catalogue, LENGTHS, excluded=5)
    engine = build_engine(SETTINGS.model_copy(update={"engine": EngineKind.REFERENCE}), tmp_path)
    check_beams(model, catalogue, prompts, engine.generate(prompts, BEAM))


def test_windows_beside_full_attention_in_vllm(tmp_path: Path, catalogue: Catalogue) -> None:
    require("vllm")
    model = write_windowed_model(tmp_path, catalogue, "gemma3")
    prompts = random_prompts(catalogue, LENGTHS, excluded=5)
    (groups,) = generate_elsewhere(tmp_path, SETTINGS, prompts, [BEAM])
    check_beams(model, catalogue, prompts, groups)


def write_adapter(folder: Path, model_dir: Path) -> Any:
    """A random LoRA adapter of rank 4 on every projection; returns the merged model in float64."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model: Any = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.double().merge_and_unload().eval()


@pytest.mark.parametrize("engine", [EngineKind.REFERENCE, pytest.param(EngineKind.VLLM, marks=pytest.mark.long)])
def test_an_adapter_is_applied(tmp_path: Path, catalogue: Catalogue, engine: EngineKind) -> None:
    write_tiny_model(tmp_path, catalogue)
    merged = write_adapter(tmp_path / "adapter", tmp_path)
    prompts = random_prompts(catalogue, LENGTHS, excluded=5)
    settings = SETTINGS.model_copy(update={"engine": engine, "adapter": tmp_path / "adapter"})
    if engine is EngineKind.REFERENCE:
        groups = build_engine(settings, tmp_path).generate(prompts, BEAM)
    else:
        require("vllm")
        (groups,) = generate_elsewhere(tmp_path, settings, prompts, [BEAM])
    check_beams(merged, catalogue, prompts, groups)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden": 96}, r"down_proj\.lora_A\.weight of \(4, 128\) in .*, \(96, 192\) there"),
        ({"layers": 1}, r"layers\.1\..* in .*, no such matrix"),
    ],
)
def test_an_adapter_of_another_base(tmp_path: Path, catalogue: Catalogue, shape: dict[str, int], message: str) -> None:
    write_tiny_model(tmp_path / "base", catalogue)
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    other = write_tiny_model(tmp_path / "other", catalogue, **shape)
    wrong = SETTINGS.model_copy(update={"engine": EngineKind.REFERENCE, "adapter": tmp_path / "adapter"})
    with pytest.raises(RequestError, match=message):
        build_engine(wrong, other)


def test_a_folder_without_an_adapter(tmp_path: Path, hf_dir: Path) -> None:
    wrong = SETTINGS.model_copy(update={"engine": EngineKind.REFERENCE, "adapter": tmp_path})
    with pytest.raises(RequestError, match=r"rollout\.adapter.*a LoRA adapter in PEFT's layout"):
        build_engine(wrong, hf_dir)


@pytest.mark.long
def test_two_workers_generate_what_one_does(tmp_path: Path, catalogue: Catalogue) -> None:
    """The engine raises where its workers differ."""
    require("vllm")
    from transformers import AutoModelForCausalLM

    write_tiny_model(tmp_path, catalogue, hidden=128)
    prompts = random_prompts(catalogue, LENGTHS, excluded=5)
    specs = [DecodeSpec(decode=decode, width=8, seed=3) for decode in Decode]
    shared = SETTINGS.model_copy(update={"tensor_parallel": 2})
    answers = dict(zip(Decode, generate_elsewhere(tmp_path, shared, prompts, specs), strict=True))
    alone = build_engine(SETTINGS.model_copy(update={"engine": EngineKind.REFERENCE}), tmp_path)
    for spec in specs:
        one = alone.generate(prompts, spec)
        assert np.array_equal(answers[spec.decode].token_PGT, one.token_PGT)
        np.testing.assert_allclose(answers[spec.decode].logp_PGT, one.logp_PGT, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).double().eval()
    check_beams(model, catalogue, prompts, answers[Decode.BEAM])


def test_heads_that_workers_cannot_share(hf_dir: Path) -> None:
    with pytest.raises(RequestError, match=r"rollout\.tensor_parallel: 3; legal: a divisor of the model's 2"):
        served_cache_bytes(SETTINGS.model_copy(update={"tensor_parallel": 3}), hf_dir, 512)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


def test_batch_invariant_kernels_are_asked_for_where_they_exist() -> None:
    on = RolloutSettings(gpus=1, batch_invariant=True)
    assert on.process_environment()["VLLM_BATCH_INVARIANT"] == "1"
    assert RolloutSettings().process_environment()["VLLM_BATCH_INVARIANT"] == "0"
    for wrong in ({"gpus": 0}, {"gpus": 1, "engine": EngineKind.REFERENCE}):
        with pytest.raises(ValueError, match="batch_invariant is true; legal: false"):
            RolloutSettings(batch_invariant=True, **wrong)  # type: ignore[arg-type]
