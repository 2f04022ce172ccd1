"""LoRA by PEFT around the learner's language model: what is trained, what the whole weights are, what an adapter file
holds.

The model's modules are wrapped in place. The matrices of the attention and of the MLP get two small factors each; of
embedding and head only the rows of new tokens are trained (PEFT's `trainable_token_indices`), because they start as
nothing but means. Everything else is frozen, so the optimiser keeps states for the factors and rows alone, and the
initial model is the same one with the adapter switched off: a reference policy needs no second copy.

Weights leave the learner under their Hugging Face names with the adapter merged: `W + scale B A`, new rows in place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.catalogue import CARD, Catalogue
from data.errors import RequestError
from rollout.live_adapter import FACTORS, ROWS, LiveAdapter
from trainer.settings import LoraSettings

NAME: Final = "default"
"""PEFT's name of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The parameters that one weight of the Hugging Face model is made of."""

    base: nn.Parameter
    factors: tuple[nn.Parameter, nn.Parameter] | None = None
    """A `[rank, in]` and B `[out, rank]`."""
    scale: float = 0.0
    rows: nn.Parameter | None = None
    """Trained rows ..."""
    row_numbers: tuple[int, ...] = ()
    """... and which they are."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, for a gather."""
        return [p for p in (self.base, *(self.factors or ()), self.rows) if p is not None]

    def whole(self) -> Tensor:
        """The weight in the type of the base; a copy where anything is added. The parameters are gathered."""
        weight = self.base.detach()
        if self.factors is not None:
            down, up = (factor.detach().float() for factor in self.factors)
            weight = (weight.float() + self.scale * (up @ down)).to(weight.dtype)
        if self.rows is not None:
            numbers = torch.tensor(self.row_numbers, device=weight.device)
            weight = weight.index_copy(0, numbers, self.rows.detach().to(weight.dtype))
        return weight


class Adapter:
    """LoRA in a language model; `lm` is changed in place."""

    def __init__(self, lm: PreTrainedModel, settings: LoraSettings, new_rows: Sequence[int]) -> None:
        """
        Args:
            lm: what is adapted; afterwards only the adapter's parameters require gradients.
            settings: rank, scale and targets.
            new_rows: rows of embedding and head that are trained.

        Raises:
            RequestError: the model has no module of the named targets.
        """
        from peft import LoraConfig, get_peft_model

        found = {name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
        absent = [target for target in settings.targets if target not in found]
        if absent:
            raise RequestError("learner.lora.targets", ", ".join(absent), f"among {', '.join(sorted(found))}")
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            trainable_token_indices=_row_config(lm, list(new_rows)) if new_rows and settings.train_new_rows else None,
        )
        self._lm = lm
        self._peft: Any = get_peft_model(lm, config, autocast_adapter_dtype=False)

    def parts(self, names: Sequence[str]) -> dict[str, Part]:
        """The parts of every weight, by the name it had before the model was adapted."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        found: dict[str, Part] = {}
        for name, module in self._lm.named_modules():
            if isinstance(module, LoraLayer):
                factors = module.lora_A[NAME].weight, module.lora_B[NAME].weight
                base = module.get_base_layer()
                found[f"{name}.weight"] = Part(base=base.weight, factors=factors, scale=float(module.scaling[NAME]))
                if base.bias is not None:
                    found[f"{name}.bias"] = Part(base=base.bias)
            elif isinstance(module, TrainableTokensLayer):
                owner = name.removesuffix(".token_adapter")
                rows, numbers = module.trainable_tokens_delta[NAME], tuple(module.token_indices[NAME])
                found[f"{owner}.weight"] = Part(base=module.get_base_layer().weight, rows=rows, row_numbers=numbers)
        plain = dict(self._lm.named_parameters(remove_duplicate=False))
        return {name: found[name] if name in found else Part(base=plain[name]) for name in names}

    def register_with_zero3(self) -> None:
        """Tell DeepSpeed that the rows' layers read a matrix that belongs to a module they do not call."""
        import deepspeed
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        for module in self._lm.modules():
            if isinstance(module, TrainableTokensLayer):
                deepspeed.zero.register_external_parameter(module, module.get_base_layer().weight)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The initial model, while open."""
        with self._peft.disable_adapter():
            yield

    def write(self, folder: Path, tensors: dict[str, Tensor], base: Path) -> None:
        """Write the adapter in PEFT's layout.

        Args:
            folder: destination.
            tensors: the trained parameters by their names in the adapted model, whole.
            base: the folder of the model that the adapter belongs to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            FACTORS + name.replace(f".{NAME}", ""): value.detach().cpu().contiguous() for name, value in tensors.items()
        }
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._peft.peft_config[NAME]
        config.base_model_name_or_path, config.inference_mode = str(base), True
        config.save_pretrained(str(folder))
        config.inference_mode = False


def _row_config(lm: PreTrainedModel, rows: list[int]) -> dict[str, list[int]]:
    """Names of embedding and head for PEFT; a tied head follows its embedding by itself."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    names = {id(module): name.rpartition(".")[2] for name, module in lm.named_modules()}
    wanted = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {names[id(module)]: rows for module in wanted}


def wire_name(name: str) -> str:
    """The name by which a trained parameter travels to engines that apply the adapter themselves."""
    matrix, found, _ = name.partition(".token_adapter.trainable_tokens_delta.")
    return f"{ROWS}{matrix}.weight" if found else FACTORS + name.replace(f".{NAME}", "")


def live_adapter(settings: LoraSettings, hf_dir: Path) -> LiveAdapter:
    """What an engine must know of the adapter of a model's folder before the first push."""
    rows = code_rows(hf_dir) if settings.train_new_rows else range(0)
    return LiveAdapter(rank=settings.rank, alpha=settings.alpha, first_row=rows.start, rows=len(rows))


def code_rows(hf_dir: Path) -> range:
    """Rows of the code tokens of a language model's folder; none where there is no language model in it."""
    if not (hf_dir / "catalogue" / CARD).is_file():
        return range(0)
    vocabulary = Catalogue.load(hf_dir / "catalogue").vocabulary
    return range(0) if vocabulary.text is None else range(vocabulary.first_code, vocabulary.tokens)


def adapter_base(folder: Path) -> Path:
    """The model that an adapter belongs to.

    Raises:
        RequestError: the folder holds no LoRA adapter.
    """
    path = folder / "adapter_config.json"
    try:
        return Path(str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(str(path), f"{error!r}", "a LoRA adapter in PEFT's layout") from error
