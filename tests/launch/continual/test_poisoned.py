"""A poisoned day: its responses are inverted, the guard rejects the update, the reason is legible, and what is served
does not move; its clean twin and at least 9 of 10 clean days that follow each other are promoted. An inversion of a
fifth of the responses is tried as well. What was decided of the clean days and of that one are properties of the test
run (`pytest -m "long or not long" --junitxml FILE`).

Cycle, registry, guard (with its default conditions), policy serving and measurement are real, by the reference engine
in this process. In place of an ABPO job an update is a plain gradient on the logged rows with ABPO's anchor weights, so
that it takes a second; real jobs are in test_command.py, real fleets in test_dying_fleet.py. Not checked: a poisoned
day with a real ABPO job, and the days of a real dataset (docs/results.md tells those).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data.catalogue import Catalogue
from data.dataset import Dataset, Samples
from data.feedback import DAY_SECONDS, day_start, write_feedback
from data.feedback_reading import FeedbackChecks, read_feedback
from data.prompts import PromptBuilder
from launch.continual.cycle import Cycle, begin_registry
from launch.continual.files import Files
from launch.continual.guard import Evidence
from launch.continual.log_folder import LogFolder
from launch.continual.measuring import HeldOut, Measurer, MeasureSettings
from launch.continual.registry import Registry
from launch.continual.results import Result
from launch.continual.rows import RowSettings
from launch.continual.settings import ServiceSettings
from launch.continual.updating import Update
from launch.simulation import ServingSettings, simulate
from rollout.reference_engine import ReferenceEngine
from rollout.settings import RolloutSettings
from tests.launch.continual.world import days
from tests.small_world import ITEMS, write_dataset
from tests.tiny_model import write_tiny_model
from trainer.anchor import Anchor, anchor_weights
from trainer.initial_model import CATALOGUE
from trainer.prompt_card import PromptCard

SETTINGS = ServiceSettings(rows=RowSettings(held_out=0.45))
USERS, REQUESTS, BEFORE = 60, 5, 6


def engine(model: Path, catalogue: Catalogue | None = None) -> ReferenceEngine:
    return ReferenceEngine(RolloutSettings.model_validate({"dtype": "float32"}), model)


def builder(model: Path) -> PromptBuilder:
    return PromptCard.read(model).builder(Catalogue.load(model / CATALOGUE), model)


def log_probs(model: torch.nn.Module, prompts: Sequence[Any], path_NL: np.ndarray) -> torch.Tensor:
    """[N] log-probability of each path over the full vocabulary; prompts of one length."""
    tokens = np.concatenate([np.stack([prompt.token_ids for prompt in prompts]), path_NL], axis=1).astype(np.int64)
    ids = torch.from_numpy(tokens)
    length = path_NL.shape[1]
    logits = model(input_ids=ids, use_cache=False).logits[:, -length - 1 : -1]
    logp_N: torch.Tensor = logits.log_softmax(-1).gather(2, ids[:, -length:, None])[:, :, 0].sum(1)
    return logp_N


def steps(model: Path, count: int, lr: float, loss: Any) -> None:
    """Optimise a model folder in place."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimiser = torch.optim.Adam(network.parameters(), lr)
    random = np.random.default_rng(0)
    for _ in range(count):
        optimiser.zero_grad()
        loss(network, random).backward()
        optimiser.step()
    network.save_pretrained(model)


class GradientUpdater:
    """Measures as the service does; updates by a plain gradient on the logged rows."""

    def __init__(self, dataset: Dataset, catalogue: Catalogue) -> None:
        self.dataset = dataset
        self.catalogue = catalogue

    def lacks(self, rows: int, responses: int) -> str:
        return "" if rows >= 32 else f"{rows} rows"

    def checks(self, model: Path, versions: Sequence[Path] = ()) -> FeedbackChecks:
        return FeedbackChecks(n_items=ITEMS, catalogues=frozenset({self.catalogue.digest}))

    def update(self, task: Update) -> Path:
        log = read_feedback(task.feedback, self.checks(task.parent))
        model = task.work / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(task.parent, model, ignore=shutil.ignore_patterns("LINEAGE.json", "VERSION.json"))
        prompts, anchors = builder(model).build(log.samples()).prompts, log.anchors()
        path_NL = np.stack([self.catalogue.tokens(int(item)) for item in anchors.item_N])
        reward_N = torch.from_numpy(np.where(anchors.response_N > 0, 1.0, -1.0)).float()
        logp0_N = torch.from_numpy(anchors.logp0_N.astype(np.float32))

        def loss(network: torch.nn.Module, random: np.random.Generator) -> torch.Tensor:
            rows = random.choice(len(prompts), 32, replace=False)
            logp_P = log_probs(network, [prompts[row] for row in rows], path_NL[rows])
            weight_P = anchor_weights(logp_P.detach(), logp0_N[rows], torch.ones(32, dtype=torch.bool), Anchor())[0]
            advantage_P = reward_N[rows] - reward_N.mean()
            return -(weight_P * advantage_P * logp_P).mean()

        steps(model, 30, 1e-3, loss)
        return model

    def measure(
        self, candidate: Path, parent: Path, held_out: Path, trained: Path, wanted: Sequence[tuple[str, float]]
    ) -> Mapping[tuple[str, float], Evidence]:
        checks = self.checks(parent)
        rows = HeldOut(log=read_feedback(held_out, checks), trained=trained, checks=checks, settings=MeasureSettings())
        return Measurer(engine, self.dataset, rows).measure(candidate, parent, wanted)

    def describe(self) -> dict[str, Any]:
        return {"updater": "gradient"}


class World:
    """A model that knows the ring, and days of what it shows to people who walk along it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._served: dict[tuple[str, str, int], pa.Table] = {}
        self.dataset = write_dataset(folder / "dataset")
        self.catalogue = Catalogue.build(self.dataset, "default")
        self.model = write_tiny_model(folder / "model", self.catalogue, hidden=32, layers=1, spread=1.0)
        PromptCard(history=4, exclude_seen=False, max_prompt_tokens=16).write(self.model)
        everything = self.walks(0, 1000)
        prompts = builder(self.model).build(everything).prompts
        path_NL = np.stack([self.catalogue.tokens(int(item)) for item in everything.target_N])

        def loss(network: torch.nn.Module, random: np.random.Generator) -> torch.Tensor:
            rows = random.choice(len(prompts), 64, replace=False)
            return -log_probs(network, [prompts[row] for row in rows], path_NL[rows]).mean()

        steps(self.model, 150, 1e-2, loss)

    def walks(self, seed: int, first_second: int) -> Samples:
        """People who walk along the ring; each of their last steps is a request, ten minutes apart."""
        random = np.random.default_rng(seed)
        start_U = random.integers(ITEMS, size=(USERS, 1))
        item_UE = (start_U + random.integers(1, 4, size=(USERS, BEFORE + REQUESTS)).cumsum(1)) % ITEMS
        at_UR = np.arange(BEFORE, BEFORE + REQUESTS)[None, :] + np.zeros((USERS, 1), np.int64)
        user_UR = np.arange(USERS)[:, None] + np.zeros((1, REQUESTS), np.int64)
        # Request r of user u comes at second 600 r + u, so that the last ones of all users are held out.
        order = np.argsort((600 * at_UR + user_UR).reshape(-1), kind="stable")
        user, at = user_UR.reshape(-1)[order], at_UR.reshape(-1)[order]
        begin = user * (BEFORE + REQUESTS)
        # The item ids of the dataset, by key.
        key = {name: number for number, name in enumerate(self.catalogue.item_keys)}
        ids = np.array([key[f"item-{place:02d}"] for place in range(ITEMS)], np.int32)
        return Samples(
            user_id_N=user.astype(np.int32),
            target_N=ids[item_UE[user, at]],
            timestamp_N=first_second + 600 * at + user,
            sample_id_N=np.arange(len(user), dtype=np.int64),
            values=ids[item_UE.reshape(-1)],
            start_N=begin,
            end_N=begin + at,
        )

    def serve(self, log: Path, registry: Registry, day: str, seed: int, *, inverted: float = 0.0) -> None:
        """A day of what is served now, with a share of the responses inverted."""
        table = self.shown(registry, day, seed)
        response_N = table["response"].combine_chunks().flatten().to_numpy()
        turned_N = np.random.default_rng(seed).random(len(table)) < inverted
        response_N = np.where(turned_N, 1 - response_N, response_N).astype(np.float32)
        at = table.schema.get_field_index("response")
        given = pa.array(response_N.reshape(-1, 1).tolist(), table.schema.field(at).type)
        write_feedback(log, table.set_column(at, table.schema.field(at), given))

    def shown(self, registry: Registry, day: str, seed: int) -> pa.Table:
        """What is served now, with sound responses; the same for twins, which is decoded once."""
        current = registry.current()
        assert current is not None
        key = (current.name, day, seed)
        if key not in self._served:
            samples = self.walks(seed, day_start(day))
            self._served[key] = simulate(
                engine(current.path),
                samples,
                np.arange(len(samples)),
                builder(current.path),
                ServingSettings(horizon=2, seed=seed),
                name=day,
                policy_version=current.name,
                batch=128,
            ).log.table
        return self._served[key]

    def registry(self, name: str) -> Registry:
        registry = Registry(self.folder / name / "registry", create=True)
        begin_registry(registry, self.model, at=0.0)
        return registry

    def run(self, name: str, day: str) -> Result:
        """One cycle after the day."""
        updater = GradientUpdater(self.dataset, self.catalogue)
        now = float(day_start(day) + 3 * DAY_SECONDS)
        log = LogFolder(str(self.folder / name / "log"))
        (result,) = Cycle(log, self.registry(name), updater, SETTINGS, clock=lambda: now, files=Files()).run()
        return result

    def one_day(self, name: str, inverted: float) -> tuple[Result, Registry]:
        registry = self.registry(name)
        (day,) = days(1)
        self.serve(self.folder / name / "log", registry, day, 1, inverted=inverted)
        return self.run(name, day), registry


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("poisoned"))


def test_a_poisoned_day_is_rejected_and_its_clean_twin_promoted(world: World) -> None:
    poisoned, registry = world.one_day("inverted", 1.0)
    assert poisoned.decision == "rejected", poisoned
    assert (registry.root / "current").readlink().name == "000001"
    assert [entry.version for entry in registry.promotions()] == [1]
    told = str(poisoned.reasons[0])
    assert re.search(r"guard: (ndcg|hr)@10 higher than the version before, tolerance .* \(loss 0\.\d+ to", told), told
    assert registry.version(2).lineage["decision"] == "rejected"
    clean, registry = world.one_day("clean", 0.0)
    assert clean.decision == "promoted", clean
    assert (registry.root / "current").readlink().name == "000002"


@pytest.mark.long
def test_clean_days_are_promoted(world: World, record_testsuite_property: Any) -> None:
    registry = world.registry("days")
    decisions = []
    for number, day in enumerate(days(10)):
        world.serve(world.folder / "days" / "log", registry, day, 10 + number)
        decisions.append(world.run("days", day).decision.value)
    record_testsuite_property("clean days", " ".join(decisions))
    assert decisions.count("promoted") >= 9, decisions


@pytest.mark.long
def test_an_inversion_of_a_fifth_is_decided_by_the_guard(world: World, record_testsuite_property: Any) -> None:
    result, registry = world.one_day("fifth", 0.2)
    assert result.decision in ("promoted", "rejected")
    served = registry.promotions()[-1].version
    assert served == (2 if result.decision == "promoted" else 1)
    record_testsuite_property("a fifth inverted", f"{result.decision}; {'; '.join(map(str, result.reasons))}")
