"""One learner and some engines with a weight channel between them: what the tests of pushes stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.catalogue import Catalogue
from rollout.channel import ChannelSettings, WeightChannel
from rollout.engine import Engine, build_engine
from rollout.peers import LocalPeer
from rollout.probe import Gap, gap_limit, item_probe, probe_gap
from rollout.sending import ModuleSource
from rollout.settings import EngineKind, RolloutSettings

FLOAT32 = gap_limit("float32", None)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def disturb(model: torch.nn.Module, seed: int, by: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((by * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


class Rig:
    """One learner (a whole model), engines as local peers, and the channel between them."""

    def __init__(
        self, engines: dict[str, Any], hf_dir: Path, catalogue: Catalogue, dtype: str = "float32", **settings: Any
    ) -> None:
        self.model = load(hf_dir, getattr(torch, dtype))
        self.source = ModuleSource(self.model)
        self.engines = engines
        paths = [catalogue.tokens(item) for item in range(catalogue.n_items)]
        self.probe = item_probe(paths, bos=catalogue.vocabulary.bos)
        settings = {"bucket_mib": 0.03, "deadline_s": 20.0, **settings}
        self.channel = WeightChannel(
            settings=ChannelSettings(**settings),
            source=LocalPeer("learner", self.source),
            engines={name: LocalPeer(name, engine) for name, engine in engines.items()},
            probe=self.probe,
            dtype=dtype,
        )

    def gap(self, engine: Any) -> Gap:
        answer = self.source.answer_probe(self.probe)
        return probe_gap(engine.score(list(self.probe.prompts), list(self.probe.completions)), answer.logp)

    def close(self) -> None:
        self.source.close()
        for peer in (self.channel.source, *self.channel.engines.values()):
            assert isinstance(peer, LocalPeer)
            peer.close()


@pytest.fixture
def rig(hf_dir: Path, catalogue: Catalogue) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(engines: dict[str, Any], model_dir: Path = hf_dir, **settings: Any) -> Rig:
        rigs.append(Rig(engines, model_dir, catalogue, **settings))
        return rigs[-1]

    yield build
    for one in rigs:
        one.close()


@pytest.fixture
def restored(hf_dir: Path, rig: Callable[..., Rig]) -> Iterator[Callable[[Engine], Engine]]:
    """Engines that other tests share: they get their first weights back, whatever the test did to them."""
    used: list[Engine] = []

    def use(engine: Engine) -> Engine:
        used.append(engine)
        return engine

    yield use
    for engine in used:
        rig({"engine": engine}).channel.push(0)


def reference(folder: Path) -> Engine:
    return build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), folder)
