"""The optimiser state behind a DeepSpeed engine, as named whole tensors: to save, to load, to look at.

A checkpoint holds, for every parameter, the float32 master weight and both AdamW moments as whole tensors in
safetensors files (each rank writes its share of the parameters), and `learner.json`. So it neither depends on the
number of ranks nor on the ZeRO stage it was written with, copying loses no bit, and reading it runs no code, which
DeepSpeed's own pickled checkpoints would.

All names of DeepSpeed's optimiser internals that we touch are in this file. All calls are collectives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data.errors import RequestError

FORMAT = 1
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
_MANIFEST = "learner.json"


class OptimiserState:
    """Named access to the masters and moments of one DeepSpeed engine."""

    def __init__(self, engine: Any, adamw: torch.optim.AdamW, stage: int, low_precision: bool) -> None:
        """Create the moments (zero, step 0) that AdamW would create in its first step."""
        self._engine = engine
        self._adamw = adamw
        self._stage = stage
        self._whole: dict[nn.Parameter, Tensor] = {}
        if stage == 0:
            self._whole = self._whole_masters(low_precision)
        for flat in self._flat_masters():
            self._adamw.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in MOMENTS},
            }
        if stage in (1, 2):
            engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _whole_masters(self, low_precision: bool) -> dict[nn.Parameter, Tensor]:
        if not low_precision:
            return {p: p for group in self._adamw.param_groups for p in group["params"]}
        wrapper = self._engine.optimizer
        return {
            low: high
            for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }

    def _flat_masters(self) -> list[Tensor]:
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._adamw.param_groups for p in group["params"]]

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self._adamw.state[self._flat_masters()[0]]["step"])

    @step.setter
    def step(self, value: int) -> None:
        for flat in self._flat_masters():
            self._adamw.state[flat]["step"].fill_(float(value))

    def get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The whole float32 tensor of one kind (`MASTER` or one of `MOMENTS`); the same on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            master = self._whole[parameter]
            return (master if kind == MASTER else self._adamw.state[master][kind]).detach().clone()
        found: Tensor = (
            safe_get_full_fp32_param(parameter) if kind == MASTER else safe_get_full_optimizer_state(parameter, kind)
        )
        return found.detach().clone()

    def set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Overwrite it; a master also renews the weight that the forward pass uses."""
        value = value.to(device=parameter.device, dtype=torch.float32)
        with torch.no_grad():
            if self._stage == 0:
                master = self._whole[parameter]
                (master if kind == MASTER else self._adamw.state[master][kind]).copy_(value)
            elif self._stage == 3:
                self._set_shard(parameter, kind, value)
            else:
                self._set_fragment(parameter, kind, value)
            if kind == MASTER:
                self._renew(parameter, value)

    def _set_shard(self, parameter: Any, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        shard = parameter.ds_tensor.numel()
        padded = torch.zeros(shard * self._engine.dp_world_size, device=value.device)
        padded[: value.numel()] = value.reshape(-1)
        rank = torch.distributed.get_rank()
        part = padded[rank * shard : (rank + 1) * shard]
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def _set_fragment(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _renew(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)


def save_state(folder: Path, state: OptimiserState, names: dict[str, nn.Parameter], rank: int, ranks: int) -> None:
    """Write this rank's share into `folder`, which exists; rank 0 also writes the manifest."""
    share: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(names.items()):
        for kind in (MASTER, *MOMENTS):
            value = state.get(parameter, kind)
            if index % ranks == rank:
                share[f"{kind}/{name}"] = value.cpu().contiguous()
    save_file(share, folder / _file_name(rank, ranks), metadata={"format": "pt"})
    if rank == 0:
        content = {
            "format": FORMAT,
            "step": state.step,
            "files": [_file_name(r, ranks) for r in range(ranks)],
            "parameters": list(names),
        }
        (folder / _MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _file_name(rank: int, ranks: int) -> str:
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def load_state(folder: Path, state: OptimiserState, names: dict[str, nn.Parameter], shapes: dict[str, Any]) -> None:
    """Read a state written with any number of ranks and any ZeRO stage.

    Raises:
        RequestError: the files are missing, of another format, or of another model.
    """
    path = folder / _MANIFEST
    if not path.is_file():
        raise RequestError(str(path), "missing", "the folder of a learner's state")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise RequestError(str(path), f"format {content.get('format')}", f"format {FORMAT}")
    if set(content["parameters"]) != set(names):
        differing = sorted(set(content["parameters"]) ^ set(names))
        raise RequestError(str(path), f"parameters that differ: {', '.join(differing[:4])}", "the state of this model")
    for key, value in _tensors(folder, content["files"]):
        kind, _, name = key.partition("/")
        if name not in names or kind not in (MASTER, *MOMENTS):
            raise RequestError(str(folder), f"tensor {key}", "the state of this model")
        if tuple(value.shape) != tuple(shapes[name]):
            raise RequestError(str(folder), f"{name} {tuple(value.shape)}", f"shape {tuple(shapes[name])}")
        state.set(names[name], kind, value)
    state.step = int(content["step"])


def _tensors(folder: Path, files: list[str]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        path = folder / file
        if not path.is_file():
            raise RequestError(str(path), "missing", "all files that learner.json names")
        with safe_open(path, framework="pt") as reader:
            for key in sorted(reader.keys()):
                yield key, reader.get_tensor(key)
