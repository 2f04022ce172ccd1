"""Contract, with the real fleet (Ray, vLLM, DeepSpeed): `windlass continual --once` that is killed by SIGKILL in the
midst of an update, between the two measurements, or after its decision and before the promotion leaves a registry whose
served version is whole; the next start ends with the weights, the decision and the guard's numbers of a run that nobody
killed. The served version loads in vLLM as a folder.

Every other point is reached with a stub in test_dying.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.continual.registry import Registry
from launch.provenance import ROOT
from tests.launch.continual.test_command import UNCHECKED, World
from tests.requirements import require
from tests.small_world import windlass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    return World(tmp_path_factory.mktemp("fleet"))


def start(world: World, registry: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return windlass(
        *("continual", str(world.recipe), "--log", str(world.log), "--registry", str(registry)),
        *("--once", "--json", "-", "--rollout.engine", "vllm"),
        cwd=world.folder,
        **UNCHECKED,
        **variables,
    )


def outcome(done: subprocess.CompletedProcess[str], registry: Path) -> tuple[Any, ...]:
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads(done.stdout)
    served = Registry(registry).current()
    assert served is not None
    Registry(registry).verify(served.number)
    weights = (served.path / "model.safetensors").read_bytes()
    return result["decision"], result["version"], result["metrics"], result["counts"], weights


@pytest.fixture(scope="module")
def undisturbed(world: World) -> tuple[Any, ...]:
    registry = world.folder / "undisturbed"
    found = outcome(start(world, registry), registry)
    assert found[:2] == ("promoted", 2)
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("point", ["step:2", "measure:1", "decided:1"])
def test_a_killed_service_ends_as_if_nobody_had_killed_it(
    world: World, undisturbed: tuple[Any, ...], point: str
) -> None:
    registry = world.folder / point.replace(":", "-")
    killed = start(world, registry, WINDLASS_FAULT=point)
    assert killed.returncode == -signal.SIGKILL
    served = Registry(registry).current()
    assert served is not None
    assert Registry(registry).verify(served.number).number == 1
    assert outcome(start(world, registry), registry) == undisturbed
    assert json.loads(start(world, registry).stdout) == []


LOAD = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=64, dtype="float32")
(answer,) = llm.generate([{"prompt_token_ids": [1, 5, 14]}], SamplingParams(max_tokens=2, temperature=0.0))
print("TOKENS", list(answer.outputs[0].token_ids))
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_served_version_is_a_folder_that_vllm_loads(world: World, undisturbed: tuple[Any, ...]) -> None:
    current = world.folder / "undisturbed" / "current"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(current)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TOKENS [" in done.stdout
