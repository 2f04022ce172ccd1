"""A tiny model on disk, and real engines on it that the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.catalogue import Catalogue
from rollout.engine import Engine, build_engine
from rollout.settings import EngineKind, RolloutSettings
from tests.requirements import require
from tests.rollout.push_rig import restored as restored
from tests.rollout.push_rig import rig as rig
from tests.tiny_model import tiny_catalogue, write_tiny_model


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on shared cores: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    """60 items, paths of three tokens."""
    return tiny_catalogue()


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    """Folder with a random float32 model, its tokenizer and the catalogue."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), catalogue)


@pytest.fixture(scope="session")
def vllm_settings() -> RolloutSettings:
    """Settings of the shared vLLM engine."""
    return RolloutSettings(dtype="float32", width=8, kv_cache_gib=0.125, threads=1)


# Not for the whole session: the engine holds the process group, which the learner's tests need for themselves.
@pytest.fixture(scope="package")
def vllm_engine(hf_dir: Path, vllm_settings: RolloutSettings) -> Iterator[Engine]:
    """A real vLLM engine in float32."""
    require("vllm")
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    engine = build_engine(vllm_settings, hf_dir, engine_id="vllm-local")
    # vLLM's CPU worker takes this function away from the whole process.
    torch.set_num_threads = set_num_threads
    yield engine
    engine.close()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="package")
def reference_engine(hf_dir: Path) -> Engine:
    """The reference engine in float32."""
    return build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), hf_dir, engine_id="reference")


@pytest.fixture(params=["reference", "vllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine in turn."""
    found: Engine = request.getfixturevalue(f"{request.param}_engine")
    return found
