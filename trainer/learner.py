"""One learner rank: a DeepSpeed engine around the policy, and what it can be asked to do.

The learner can be used inside any process (`Learner.alone`), or as one of several ranks (`learner_group`). Every
method is a collective: all ranks get the same call with the whole batch, take their share of it, and answer with
results for that share; `learner_group` joins them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.constraint import Constraint
from data.errors import RunError
from data.faults import fault_point
from data.records import BoolArray, FloatArray, IntArray
from rollout.buckets import TensorSpec, describe_module
from rollout.movers import Endpoint, MoverRequest
from rollout.probe import Gap, Probe, ProbeAnswer, probe_gap
from rollout.receiving import PushMessage, Receipt
from rollout.sending import Outbox
from trainer.completion_scores import ScoreOutputs, score_batches, score_probe
from trainer.dropout import BranchDropout
from trainer.export import export_hf
from trainer.learner_state import OptimiserState, load_state, save_state
from trainer.legal import LegalTable, TargetSets, replay
from trainer.lora import Adapter, Part, code_rows, wire_name
from trainer.losses import UpdateInputs, join_statistics, token_inputs, token_loss
from trainer.micro_batches import micro_batches
from trainer.optimisation import adamw, clips_itself, learning_rate
from trainer.policy import (
    Policy,
    TokenScores,
    WiderTwin,
    full_log_probabilities,
    load_language_model,
    log_probabilities_in_stretches,
    token_scores,
    token_scores_in_stretches,
)
from trainer.ranks import RankPlace, join_ranks, prepare_cpu, start_engine, take_part, uses_cuda
from trainer.settings import LearnerSettings, Precision
from trainer.trees import Completions, Piece, TreeBatch, completion_pieces, sequence_pieces

SequenceRows = Sequence[tuple[IntArray, BoolArray]]

_DTYPES = {Precision.FLOAT32: torch.float32, Precision.BFLOAT16: torch.bfloat16}


class Learner:
    """A rank. `hf_dir` is a folder with a Hugging Face causal language model."""

    def __init__(
        self,
        settings: LearnerSettings,
        hf_dir: Path,
        constraint: Constraint[Any],
        *,
        seed: int = 0,
        total_steps: int = 1,
        reference_dir: Path | None = None,
        place: RankPlace | None = None,
    ) -> None:
        self.settings = settings
        self.place = place or RankPlace()
        self.hf_dir = Path(hf_dir)
        self.total_steps = total_steps
        self._constraint = constraint
        self._cuda = uses_cuda(settings)
        self._device = torch.device("cuda", self.place.local_rank) if self._cuda else torch.device("cpu")
        self._dtype = _DTYPES[settings.dtype]
        prepare_cpu(settings, self.place.ranks)
        torch.manual_seed(seed)
        join_ranks(settings, self.place)
        # Frozen weights need no float32 masters.
        lm = load_language_model(self.hf_dir, self._dtype if settings.lora.on else torch.float32)
        self._lm = lm
        self._twin = WiderTwin(lm, self._dtype)
        self._describe = describe_module(lm, str(self._dtype).removeprefix("torch."))
        self._weight_names = [name for name, _ in lm.named_parameters()]
        self._adapter = Adapter(lm, settings.lora, code_rows(self.hf_dir)) if settings.lora.on else None
        self._shapes = {name: tuple(parameter.shape) for name, parameter in lm.named_parameters()}
        if settings.activation_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._seed = seed
        self._dropout = BranchDropout(lm, settings.dropout)
        self._reference: Callable[[TreeBatch], Tensor] | None = None
        if reference_dir is not None and self._adapter is not None and Path(reference_dir) == self.hf_dir:
            self._reference = self._without_adapter
        elif reference_dir is not None:
            frozen = load_language_model(Path(reference_dir), self._dtype).to(self._device)
            self._reference = Policy(frozen.eval().requires_grad_(False))
        self._grad_norm = 0.0
        self._start_engine(Policy(lm))
        self._outbox = Outbox()

    def _start_engine(self, policy: Policy) -> None:
        policy.to(self._device)
        policy.train()  # activation checkpointing asks for it; the model has no dropout of its own
        optimiser = adamw(policy, self.settings)
        optimiser.register_step_pre_hook(self._before_optimiser_step)
        self._engine = start_engine(policy, optimiser, self.settings, self.place.ranks)
        if self._adapter is not None and self.settings.zero_stage == 3:
            self._adapter.register_with_zero3()
        self._adamw = optimiser
        low_precision = self.settings.dtype is not Precision.FLOAT32
        self._state = OptimiserState(self._engine, optimiser, self.settings.zero_stage, low_precision)
        named = {name.removeprefix("lm."): parameter for name, parameter in self._engine.module.named_parameters()}
        self._trained: dict[str, nn.Parameter] = {name: p for name, p in named.items() if p.requires_grad}
        self._parts: dict[str, Part] = (
            {name: Part(base=parameter) for name, parameter in named.items()}
            if self._adapter is None
            else self._adapter.parts(self._weight_names)
        )

    def _without_adapter(self, batch: TreeBatch) -> Tensor:
        """The initial model: the reference of a learner that trains an adapter."""
        assert self._adapter is not None
        with self._adapter.off():
            logits_UV: Tensor = self._engine(batch)
            return logits_UV

    def _before_optimiser_step(self, *_: Any) -> None:
        """Gradients are summed over ranks here. Raising leaves weights and moments as they were."""
        if not clips_itself(self.settings) or not self._stepping:
            return
        limit = self.settings.grad_clip or math.inf
        self._grad_norm = float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))
        if not math.isfinite(self._grad_norm):
            raise RunError(_non_finite("gradient norm", self._grad_norm, self.step))

    _stepping = False

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self._state.step

    def steps_taken(self) -> int:
        """`step` as a call, for a rank in another process."""
        return self.step

    # -- scores

    def score(self, completions: Completions, temperature: float) -> ScoreOutputs:
        """Scores of this rank's share, zeros elsewhere; without gradient, by the weights as they are."""
        batches, table = self._share(completions)
        outputs = score_batches(self._engine, batches, table, completions.shape, temperature, self._device)
        if self._reference is not None:
            reference = score_batches(self._reference, batches, table, completions.shape, temperature, self._device)
            return ScoreOutputs(**outputs, ref_logp_PGT=reference["logp_PGT"])
        return ScoreOutputs(**outputs)

    def noise(self, completions: Completions, temperature: float, logp_PGT: FloatArray) -> dict[str, float]:
        """The learner's own gap to a wider type on its share: sum, max and count of |difference| of `logp` per token.

        Args:
            completions: what was scored.
            temperature: as it was scored.
            logp_PGT: of `score`, by the present weights.
        """
        batches, table = self._share(completions)
        exact = score_batches(self._exact(), batches, table, completions.shape, temperature, self._device)
        legal_PGT = exact["legal_PGT"]
        gap_X = np.abs(logp_PGT[legal_PGT].astype(np.float64) - exact["logp_PGT"][legal_PGT])
        return {"sum": float(gap_X.sum()), "max": float(gap_X.max(initial=0)), "count": float(gap_X.size)}

    def _exact(self) -> Callable[[TreeBatch], Tensor]:
        """The policy in a wider type, with a copy of the weights as the forward pass sees them. A collective."""
        return self._twin.holding(self.whole_parameters(), self._device)

    def _share(self, completions: Completions) -> tuple[list[TreeBatch], LegalTable]:
        pieces = completion_pieces(completions, self.settings.row_tokens, self.settings.token_budget)
        batches = self._deal(pieces)
        _, members, width = completions.shape
        slots = np.concatenate([np.zeros(0, dtype=np.int64), *(batch.slot_K.numpy() for batch in batches)])
        rows = np.unique(slots // (members * width))
        return batches, replay(self._constraint, completions, [int(row) for row in rows])

    def _deal(self, pieces: Sequence[Piece]) -> list[TreeBatch]:
        return micro_batches(
            pieces,
            token_budget=self.settings.token_budget,
            rank=self.place.rank,
            ranks=self.place.ranks,
        )

    # -- updates

    def update(self, completions: Completions, inputs: UpdateInputs) -> dict[str, float]:
        """One optimiser step on the whole batch; statistics of this rank's share (`losses.join_statistics`).

        Raises:
            RunError: the loss or the gradient is not finite; the weights are as before.
            ValueError: a policy or KL weight on a token that the constraint forbids.
        """
        batches, table = self._share(completions)
        weighted = (inputs.policy_weight_PGT != 0) | (inputs.kl_weight_PGT != 0)
        parts = []
        for batch in batches:
            if (weighted.reshape(-1)[batch.slot_K.numpy()] & ~table.legal_PGT.reshape(-1)[batch.slot_K.numpy()]).any():
                raise ValueError("a completion with a policy weight is not legal under the constraint")
            moved = batch.to(self._device)
            scores, anchor = self._graded_scores(
                moved,
                table.sets(batch).to(self._device),
                inputs.temperature,
                entropy_gradient=inputs.entropy_weight_PGT is not None,
            )
            loss, statistics = token_loss(
                scores.logp_K, scores.full_logp_K, token_inputs(inputs, moved.slot_K, moved.unit_K), scores.entropy_K
            )
            parts.append(statistics)
            self._backward(loss, anchor)
        return self._finish_step(join_statistics(parts))

    def _graded_scores(
        self, batch: TreeBatch, legal: TargetSets, temperature: float, *, entropy_gradient: bool
    ) -> tuple[TokenScores, Tensor]:
        """Scores for a loss, and a number that hangs on all weights."""
        positions = self.settings.head_positions
        if positions:
            return token_scores_in_stretches(
                self._engine, batch, legal, temperature, positions=positions, entropy_gradient=entropy_gradient
            )
        logits_UV = self._engine(batch)
        return token_scores(logits_UV, batch, legal, temperature, entropy_gradient=entropy_gradient), logits_UV[0, 0]

    def _graded_logp(self, batch: TreeBatch) -> tuple[Tensor, Tensor]:
        """Full-vocabulary log-probabilities for a loss, and a number that hangs on all weights."""
        positions = self.settings.head_positions
        if positions:
            return log_probabilities_in_stretches(self._engine, batch, positions=positions)
        logits_UV = self._engine(batch)
        return full_log_probabilities(logits_UV, batch), logits_UV[0, 0]

    def update_sft(self, rows: SequenceRows) -> dict[str, float]:
        """One optimiser step on token sequences: full-vocabulary NLL, mean over all marked tokens of the batch."""
        pieces = sequence_pieces(rows, self.settings.row_tokens)
        count = max(sum(len(piece.target_K) for piece in pieces), 1)
        parts = []
        devices = [self._device] if self._cuda else []
        with self._dropout.applied(self._seed, self.step, self.place.rank, devices):
            for batch in self._deal(pieces):
                moved = batch.to(self._device)
                logp_K, anchor = self._graded_logp(moved)
                nll = -logp_K.sum()
                parts.append({"loss": float(nll.detach().double()) / count, "tokens": float(len(batch.target_K))})
                self._backward(nll / count, anchor)
        return self._finish_step(join_statistics(parts))

    @torch.no_grad()
    def evaluate_nll(self, rows: SequenceRows) -> dict[str, float]:
        """Sum of the full-vocabulary NLL over this rank's share, and its number of tokens."""
        parts = []
        for batch in self._deal(sequence_pieces(rows, self.settings.row_tokens)):
            moved = batch.to(self._device)
            nll = -full_log_probabilities(self._engine(moved), moved).double().sum()
            parts.append({"nll": float(nll), "tokens": float(len(batch.target_K))})
        return join_statistics(parts)

    def _backward(self, loss: Tensor, anchor: Tensor) -> None:
        # DeepSpeed divides by the ranks. The zero keeps fillers, and batches without weights, in the graph.
        self._engine.backward(loss * self.place.ranks + anchor.float() * 0.0)
        fault_point("backward")

    def _finish_step(self, statistics: dict[str, float]) -> dict[str, float]:
        finite = torch.tensor(float(math.isfinite(statistics["loss"])))
        finite = finite.to(self._device)
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not float(finite):
            raise RunError(_non_finite("loss", statistics["loss"], self.step))
        rate = learning_rate(self.settings, self.step, self.total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        fault_point("optimiser_step")
        self._stepping = True
        self._engine.step()
        self._stepping = False
        if not clips_itself(self.settings):
            self._grad_norm = float(self._engine.get_global_grad_norm())
            if not math.isfinite(self._grad_norm):
                raise RunError(_non_finite("gradient norm", self._grad_norm, self.step))
        return statistics

    def step_metrics(self) -> dict[str, float]:
        """Global gradient norm before clipping, and learning rate, of the last step."""
        return {"grad_norm": self._grad_norm, "lr": float(self._adamw.param_groups[0]["lr"])}

    # -- weights

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) in the forward pass's type, tied ones once, adapters merged. A collective.

        ZeRO-3 gathers one weight at a time and the copy is made inside the gather; gathers are never nested.
        """
        for name, part in self._parts.items():
            yield name, self._whole(part)

    def _whole(self, part: Part) -> Tensor:
        if self.settings.zero_stage < 3:
            return part.whole()
        import deepspeed

        with deepspeed.zero.GatheredParameters(part.parameters):
            return part.whole().clone()

    def describe_weights(self) -> tuple[list[TensorSpec], dict[str, str]]:
        """For the weight channel: specs of what travels, and tied names."""
        if not self.settings.lora.alone:
            return self._describe
        dtype = str(self._dtype).removeprefix("torch.")
        names = self._trained
        return [TensorSpec(name=wire_name(name), dtype=dtype, shape=self._shapes[name]) for name in names], {}

    def open_push(self, request: MoverRequest) -> Endpoint | None:
        """For the weight channel; rank 0 answers."""
        return self._outbox.open(request) if self.place.rank == 0 else None

    def send_push(self, message: PushMessage) -> Receipt | None:
        """For the weight channel: all ranks gather, rank 0 sends."""
        tensors = self._travelling()
        try:
            return self._outbox.send(message, tensors) if self.place.rank == 0 else None
        finally:
            take_part(tensors)  # a push that failed half way must not leave the other ranks alone in a gather

    def _travelling(self) -> Iterator[tuple[str, Tensor]]:
        """What the weight channel carries, in the order of `describe_weights`."""
        if self.settings.lora.alone:
            for name, parameter in self._trained.items():
                yield wire_name(name), self._whole(Part(base=parameter)).to(self._dtype)
            return
        buffers = dict(self._lm.named_buffers())
        for spec in self._describe[0]:
            part = self._parts.get(spec.name)
            yield spec.name, buffers[spec.name] if part is None else self._whole(part)

    def answer_probe(self, probe: Probe) -> ProbeAnswer:
        """For the weight channel: every rank scores the whole probe, because a forward pass is a collective."""
        logp = score_probe(self._engine, probe, self._device)
        short = self.settings.dtype is not Precision.FLOAT32
        return ProbeAnswer(logp=tuple(logp), noise=self._noise(logp, probe) if short else None)

    def probe_noise(self, probe: Probe) -> Gap:
        """For the weight channel: the learner's own gap to a wider type on the probe. A collective."""
        return self._noise(score_probe(self._engine, probe, self._device), probe)

    def _noise(self, logp: Sequence[FloatArray], probe: Probe) -> Gap:
        return probe_gap(logp, score_probe(self._exact(), probe, self._device))

    # -- disk

    def save(self, folder: Path) -> None:
        """Write this rank's part of the state into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder, self._state, self._trained, self.place.rank, self.place.ranks)

    def load(self, folder: Path) -> None:
        """Continue from a state written with any number of ranks and any ZeRO stage."""
        load_state(folder, self._state, self._trained, self._shapes)

    def export_hf(self, folder: Path) -> None:
        """Write the Hugging Face folder; all ranks gather, rank 0 writes."""
        if self.place.rank == 0:
            export_hf(folder, self._lm, self.whole_parameters(), self.hf_dir, self._dtype)
        else:
            take_part(self.whole_parameters())

    def export_adapter(self, folder: Path) -> None:
        """Write the trained adapter in PEFT's layout; all ranks gather, rank 0 writes.

        Raises:
            ValueError: the learner trains all weights.
        """
        if self._adapter is None:
            raise ValueError("there is no adapter: the learner trains all weights")
        tensors = {name: self._whole(Part(base=parameter)) for name, parameter in self._trained.items()}
        if self.place.rank == 0:
            self._adapter.write(folder, tensors, self.hf_dir)

    def give_memory(self) -> None:
        """Give back what torch's allocator keeps of the card for later; on CPU it keeps nothing."""
        if self._cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the mover and DeepSpeed's hooks."""
        self._outbox.close()
        self._engine.destroy()


def _non_finite(what: str, value: float, step: int) -> str:
    return f"{what} {value} in optimiser step {step + 1}; stopped before the step, the last checkpoint stays valid"
