"""Whether a LoRA adapter belongs to a model: every factor must fit the matrix that it names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.errors import RequestError
from rollout.live_adapter import FACTORS

WEIGHTS = "adapter_model.safetensors"


def check_adapter(adapter: Path, hf_dir: Path) -> None:
    """Refuse an adapter of another base.

    Args:
        adapter: folder in PEFT's layout; one without safetensors is left to the engine.
        hf_dir: folder of the model.

    Raises:
        RequestError: the file is damaged, or names a matrix that the model lacks or has in another shape.
    """
    path = adapter / WEIGHTS
    if not path.is_file():
        return
    shapes = _shapes(hf_dir)
    legal = f"an adapter that was trained on the model of {hf_dir}"
    try:
        with safe_open(path, framework="pt") as reader:
            for key in sorted(reader.keys()):
                found = tuple(reader.get_slice(key).get_shape())
                name, _, factor = key.removeprefix(FACTORS).removesuffix(".weight").rpartition(".")
                if factor not in ("lora_A", "lora_B"):
                    continue
                whole = shapes.get(name)
                axis = 1 if factor == "lora_A" else 0
                if whole is None or whole[axis] != found[axis]:
                    has = "no such matrix" if whole is None else f"{whole} there"
                    raise RequestError("rollout.adapter", f"{key} of {found} in {adapter}, {has}", legal)
    except SafetensorError as error:
        raise RequestError("rollout.adapter", f"{path} is damaged ({error})", legal) from error


def _shapes(hf_dir: Path) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf_dir))
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, "weight")}
