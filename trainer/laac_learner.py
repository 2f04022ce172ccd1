"""One rank of LAAC's learner, or of a baseline's: DeepSpeed engines around `trainer.laac_modules`, step by step.

LAAC has two engines, because the critics are the fast player and the policy the slow one: a step updates the critics on
L + alpha * E_g + beta * E_td, projects their weights, updates the policy on the new first critic, and moves the target
networks. A baseline has one engine. Every method is a collective: all ranks get the same call, and each takes its share
of the batch, which is a pure function of (seed, step).

Source: methods.md section 5, "Steps".
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.errors import RequestError, RunError
from data.faults import fault_point
from data.records import BoolArray, FloatArray
from reward.laac import ItemNetwork, LaacShape
from trainer.laac_batches import Batch, Counts, TransitionTable
from trainer.laac_losses import bounded_target, follow, project_norms
from trainer.laac_modules import Actor, Critics, PolicyView, Supervised, Terms
from trainer.laac_settings import LaacSettings, Method
from trainer.learner_state import OptimiserState, load_state, save_state
from trainer.policy_expectation import FixedPolicy
from trainer.ranks import RankPlace, join_ranks, prepare_cpu, start_engine, uses_cuda

TARGETS = "targets.safetensors"
BETAS = (0.9, 0.999)
SQUARED = ("grounding", "td")
"""Terms that grow with the square of the critics' values."""
WATCHED = ("gap", *SQUARED)


class DivergedError(RunError):
    """The critics left what rewards can be worth, or a term is not finite; the message names the term."""


class Player:
    """A module that is trained: its engine, and its state by name."""

    def __init__(self, name: str, module: nn.Module, lr: float, settings: LaacSettings, ranks: int) -> None:
        learner = settings.learner()
        self.name = name
        self.lr = lr
        self.module = module
        self._names = dict(module.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._names.items()}
        # The rate is 0 until the first step: DeepSpeed may take dummy steps at start.
        self._adamw = torch.optim.AdamW(module.parameters(), lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
        self.engine = start_engine(module, self._adamw, learner, ranks)
        # A single rank has nobody to sum its gradients with, and the copies for it are a tenth of a small step.
        self.engine.enable_backward_allreduce = ranks > 1
        self._state = OptimiserState(self.engine, self._adamw, learner.zero_stage, low_precision=False)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._state.step

    def update(self, loss: Tensor, ranks: int) -> None:
        """One step; DeepSpeed divides by the ranks, whose losses are parts of a sum."""
        self.engine.backward(loss * ranks)
        for group in self._adamw.param_groups:
            group["lr"] = self.lr
        fault_point("optimiser_step")
        self.engine.step()

    def finite(self) -> bool:
        """Whether all weights are."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self._names.values())

    def save(self, folder: Path, place: RankPlace) -> None:
        """Write this rank's share of weights and moments."""
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder, self._state, self._names, place.rank, place.ranks)

    def load(self, folder: Path) -> None:
        """Continue from a state of any number of ranks."""
        load_state(folder, self._state, self._names, self._shapes)


class LaacLearner:
    """A rank."""

    def __init__(
        self,
        settings: LaacSettings,
        shape: LaacShape,
        table: TransitionTable,
        *,
        seed: int,
        novel_I: BoolArray,
        unit_ID: FloatArray,
        place: RankPlace | None = None,
    ) -> None:
        """
        Args:
            settings: the section `laac`.
            shape: of all networks.
            table: what is learned from.
            seed: of weights and batches.
            novel_I: tail items, for smorl.
            unit_ID: item vectors of length 1 or 0, for smorl.
        """
        self.settings = settings
        self.place = place or RankPlace()
        self._table = table
        self._seed = seed
        learner = settings.learner()
        self._device = torch.device("cuda", self.place.local_rank) if uses_cuda(learner) else torch.device("cpu")
        prepare_cpu(learner, self.place.ranks)
        join_ranks(learner, self.place)
        ranks = self.place.ranks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if settings.method is Method.LAAC:
                self._actor, self._critics = Actor(shape, settings), Critics(shape, settings)
                modules: dict[str, tuple[nn.Module, float]] = {
                    "critics": (self._critics, settings.lr_critic),
                    "actor": (self._actor, settings.lr_actor),
                }
                follower: nn.Module = self._critics
            else:
                novel_N = torch.from_numpy(novel_I).float()
                self._supervised = Supervised(shape, settings, novel_N, torch.from_numpy(unit_ID))
                modules = {"supervised": (self._supervised, settings.lr_actor)}
                follower = self._supervised
        self._players = {
            name: Player(name, module.to(self._device), lr, settings, ranks) for name, (module, lr) in modules.items()
        }
        self._target = copy.deepcopy(follower).requires_grad_(False)
        self._followed, self._following = list(follower.parameters()), list(self._target.parameters())
        self._first: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Steps taken."""
        return min(player.step for player in self._players.values())

    def steps_taken(self) -> int:
        """`step` as a call, for a rank in another process."""
        return self.step

    def run(self, steps: int) -> dict[str, float]:
        """Take so many steps; returns the means of their terms over the whole batches.

        Raises:
            DivergedError: a term is not finite, or beyond what rewards can be worth; names it and the step.
        """
        sums: dict[str, float] = {}
        for _ in range(steps):
            batch, counts = self._table.batch(self._seed, self.step, self.settings.batch, self.place)
            batch = Batch(*(tensor.to(self._device) for tensor in batch))
            terms = self._laac(batch, counts) if self.settings.method is Method.LAAC else self._baseline(batch, counts)
            values = self._joined(terms)
            self._check(values, self.step)
            values["referenced"] = counts.referenced / counts.rows
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        return {name: value / max(steps, 1) for name, value in sums.items()}

    def _queries(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the policy scores items against in the states and the next ones: its own states, or the critics'.

        Its own carry a gradient: it does not change before its own step, so that they serve both players.
        """
        if self.settings.shared_encoder:
            with torch.no_grad():
                return self._critics.state(batch.history_BH), self._critics.state(batch.next_BH)
        query_BD = self._actor.network.state(batch.history_BH)
        with torch.no_grad():
            return query_BD, self._actor.network.state(batch.next_BH)

    def _policy(self, query_BD: Tensor) -> FixedPolicy:
        return FixedPolicy(query_BD, self._actor.network.item_ND, chunk=self.settings.chunk)

    def _laac(self, batch: Batch, counts: Counts) -> Terms:
        critics, target = self._critics, cast(Critics, self._target)
        warm = self.step < self.settings.warmstart_steps
        query_BD, next_query_BD = self._queries(batch)
        with torch.no_grad():
            policy = PolicyView(self._policy(query_BD), self._policy(next_query_BD))
            next_B = torch.minimum(*target.policy_values(target.state(batch.next_BH), policy.next))
            target_B = bounded_target(batch.reward_B, batch.done_B, next_B, self.settings.discount)
        loss, terms = self._players["critics"].engine(batch, counts, policy, target_B, warm=warm)
        self._players["critics"].update(loss, self.place.ranks)
        if self.settings.norm_limit is not None:
            projected = project_norms(self._followed, self.settings.norm_limit)
            terms["projected"] = torch.tensor(projected / self.place.ranks)
        with torch.no_grad():
            state_BD = critics.state(batch.history_BH)
        now = policy.now
        if self.settings.shared_encoder:
            query_BD, now = state_BD, self._policy(state_BD)
        critic = (None, None) if warm else (state_BD, critics.twins[0].item_ND.detach())
        loss, actor_terms = self._players["actor"].engine(batch, counts, now, query_BD, *critic)
        self._players["actor"].update(loss, self.place.ranks)
        follow(self._following, self._followed, self.settings.target_rate)
        joined: Terms = {**terms, **actor_terms}
        return joined

    def _baseline(self, batch: Batch, counts: Counts) -> Terms:
        targets = self._supervised.targets(batch, cast(Supervised, self._target))
        loss, terms = self._players["supervised"].engine(batch, counts, targets)
        self._players["supervised"].update(loss, self.place.ranks)
        if targets:
            follow(self._following, self._followed, self.settings.target_rate)
        return cast(Terms, terms)

    def _joined(self, terms: Terms) -> dict[str, float]:
        """Sums over the ranks."""
        values = torch.stack([value.to(self._device) for value in terms.values()]).double()
        if self.place.ranks > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(terms, values.tolist(), strict=True))

    def _check(self, values: dict[str, float], step: int) -> None:
        """Raise where a term says that the critics' values are far beyond what rewards can be worth."""
        bound = self.settings.divergence / (1.0 - self.settings.discount)
        limits = {name: bound**2 if name in SQUARED else bound for name in WATCHED}
        for name in values.keys() & set(WATCHED):
            self._first.setdefault(name, values[name])
        grown = {
            name: math.inf if not math.isfinite(value) else abs(value) / limits.get(name, math.inf)
            for name, value in values.items()
        }
        worst = max(grown, key=lambda name: grown[name])
        if grown[worst] > 1.0:
            began = f" from {self._first[worst]:.4g}" if worst in self._first else ""
            limit = f"; the limit is {limits[worst]:.4g}" if worst in limits else ""
            raise DivergedError(
                f"the critics diverged in step {step}: {worst} grew{began} to {values[worst]:.4g}{limit}"
            )

    def weights(self, player: str) -> dict[str, Any]:
        """Weights of a module by name as arrays; the same on every rank."""
        module = self._players[player].module
        return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}

    # -- disk

    def save(self, folder: Path) -> None:
        """Write this rank's part of the state into `folder`.

        Raises:
            DivergedError: a weight is not finite.
        """
        for name, player in self._players.items():
            if not player.finite():
                raise DivergedError(f"the critics diverged in step {self.step}: weights of the {name} are not finite")
            player.save(folder / name, self.place)
        if self.place.rank == 0:
            save_file({n: t.cpu().contiguous() for n, t in self._target.state_dict().items()}, folder / TARGETS)

    def load(self, folder: Path) -> None:
        """Continue from a state written with any number of ranks.

        Raises:
            RequestError: the state is missing or of other networks.
        """
        for name, player in self._players.items():
            player.load(folder / name)
        path = folder / TARGETS
        if not path.is_file():
            raise RequestError(str(path), "missing", "the target networks of a laac checkpoint")
        self._target.load_state_dict(load_file(path, device=str(self._device)))

    def close(self) -> None:
        """Free DeepSpeed's hooks."""
        for player in self._players.values():
            player.engine.destroy()


def policy_networks(
    settings: LaacSettings, shape: LaacShape, weights: dict[str, dict[str, Any]]
) -> tuple[nn.ModuleList, list[int]]:
    """The policy's networks and which of them score, for `reward.laac.LaacRanker`."""
    if settings.method is not Method.LAAC:
        return _filled([ItemNetwork(shape)], [_below(weights["supervised"], "network.")]), [0]
    own = _below(weights["actor"], "network.")
    if not settings.shared_encoder:
        return _filled([ItemNetwork(shape)], [own]), [0]
    lender = _below(weights["critics"], "networks.0.")
    return _filled([ItemNetwork(shape, own_encoder=False), ItemNetwork(shape)], [own, lender]), [0]


def critic_networks(shape: LaacShape, weights: dict[str, dict[str, Any]]) -> tuple[nn.ModuleList, list[int]]:
    """The critics' networks and which of them score: both."""
    parts = [_below(weights["critics"], f"networks.{number}.") for number in (0, 1)]
    return _filled([ItemNetwork(shape), ItemNetwork(shape, own_encoder=False)], parts), [0, 1]


def _filled(networks: list[ItemNetwork], weights: list[dict[str, Any]]) -> nn.ModuleList:
    for network, part in zip(networks, weights, strict=True):
        network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in part.items()})
    return nn.ModuleList(networks)


def _below(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
