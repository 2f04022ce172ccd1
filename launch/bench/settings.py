"""Options that all benchmarks share."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Any

from pydantic import Field

from data.errors import RequestError
from data.settings import Settings
from rollout.settings import EngineDtype


class Device(StrEnum):
    """Where the work runs."""

    CPU = "cpu"
    CUDA = "cuda"


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


class BenchSettings(Settings):
    """What is measured, how large, how often. A benchmark says which of these it does not use."""

    model: str = "small"
    """`tiny`, `small` (6 layers, width 384, 10.6 M parameters), `0.5b`, `1.5b`, all with random weights, or an hf
    folder with a catalogue inside."""
    prompts: int = Field(64, ge=1)
    """Prompts of one batch."""
    prompt_len: int = Field(250, ge=1)
    """Tokens of each prompt."""
    width: int = Field(16, ge=1, le=1024)
    """Beams per prompt."""
    levels: int = Field(3, ge=1, le=8)
    """Tokens of an item; a model folder brings its own."""
    group: int = Field(16, ge=2, le=1024)
    """Completions per prompt in learning."""
    dtype: EngineDtype = EngineDtype.BFLOAT16
    """Type of weights and activations, the same for every way: float32 or bfloat16."""
    device: Device = Device.CPU
    """cpu or cuda."""
    threads: int = Field(default_factory=usable_cores, ge=1, le=4096)
    """Computing threads of every way; by default the cores of this process."""
    repeats: int = Field(5, ge=1)
    """Measured repetitions after the warm-up; slow baselines say when they take fewer."""
    seed: int = Field(0, ge=0)
    """Of weights, catalogue, prompts and draws."""

    def check_device(self, *possible: Device) -> None:
        """Refuse a device that is not there, or none of the `possible` ones where some are named.

        Raises:
            RequestError: names what there is.
        """
        if possible and self.device not in possible:
            raise RequestError("--device", self.device, f"{', '.join(possible)}: nothing else runs this")
        if self.device is Device.CUDA:
            import torch

            if not torch.cuda.is_available():
                raise RequestError("--device", "cuda, and no card is usable here", "cpu")

    def record(self) -> dict[str, Any]:
        """The settings as they stand in the answer."""
        return self.model_dump(mode="json")
