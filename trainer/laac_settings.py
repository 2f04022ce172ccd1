"""Section `laac` of the configuration: the method, its reference, its objective and its learner."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.settings import Settings
from reward.laac import Encoder
from trainer.laac_losses import Backup, Grounding
from trainer.settings import Device, LearnerSettings, Precision


class Method(StrEnum):
    """What is trained on the transitions."""

    LAAC = "laac"
    """Actor and twin critics with a reference (methods.md section 5)."""
    BEHAVIOUR_CLONING = "bc"
    """The logged action's likelihood alone."""
    SQN = "sqn"
    """Cloning with a Q head beside it on one encoder (Xin et al. 2020)."""
    SMORL = "smorl"
    """SQN with three Q heads: reward, diversity, novelty (Stamenkovic et al. 2022)."""
    REFERENCE = "reference"
    """Nothing: the reference's answers alone, as lists."""

    @property
    def asks(self) -> bool:
        """Whether the method uses a reference."""
        return self in (Method.LAAC, Method.REFERENCE)


class ReferenceKind(StrEnum):
    """Where the reference's answers come from."""

    RANDOM = "random"
    """Items drawn at random, the ablation."""
    LLM = "llm"
    """A language model of the fleet, asked once and cached."""
    LOGGED = "logged"
    """The logged action itself: ATAC's reference, whose grounding is 0."""


class Weighting(StrEnum):
    """Probability of the answers of a state."""

    UNIFORM = "uniform"
    RANK = "rank"
    """In proportion to 1/rank."""


class ReferenceSettings(Settings):
    """The reference policy: what it is asked, and where its answers are kept."""

    kind: ReferenceKind = ReferenceKind.LLM
    """random, llm or logged."""
    model: Path | None = None
    """Model that is asked (a run, checkpoint or hf folder of this dataset); for kind llm without a written cache."""
    cache: Path | None = None
    """Parquet file with the answers, written where it is not there; none keeps it in the run folder."""
    window: int = Field(5, ge=1, le=10_000)
    """Latest items that the model is shown."""
    candidates: int = Field(100, ge=1, le=100_000)
    """Items drawn at random for each state, among which the model answers."""
    show_candidates: bool = True
    """Write the candidates into a language model's prompt, which then may be as long as `rollout.max_model_len` leaves
    room for. The prompts of a model of codes have no such part: the constraint alone tells it."""
    answers: int = Field(10, ge=1, le=1024)
    """Most answers of a state."""
    weighting: Weighting = Weighting.UNIFORM
    """uniform, or rank (1/rank)."""
    states: int | None = Field(None, ge=1)
    """Training states that are asked, a seeded sample; the others are masked. None asks all."""
    test_rows: bool = True
    """Ask the test rows too, so that method reference can be evaluated from the same cache."""


class LaacSettings(Settings):
    """LAAC, and the baselines on the same transitions."""

    method: Method = Method.LAAC
    """laac, bc, sqn, smorl, or reference (no training)."""
    reference: ReferenceSettings = ReferenceSettings()
    """The reference policy."""
    alpha: float = Field(1.0, ge=0, le=1e6)
    """Weight of the grounding, which ties the values of the reference's items to the log."""
    beta: float = Field(1.0, ge=0, le=1e6)
    """Weight of the temporal difference; of the Q loss in sqn and smorl."""
    discount: float = Field(0.99, ge=0, lt=1)
    """Discount of the next state's value."""
    grounding: Grounding = Grounding.SQUARE
    """square, hinge (optimism only) or per_action."""
    backup: Backup = Backup.TARGET
    """target networks, or residual_0.5_0.5 (half of it on the critic itself)."""
    norm_limit: float | None = Field(100.0, gt=0)
    """Largest L2 norm of each weight of the critics, projected after every step; none leaves the loss without a lower
    bound."""
    normalized_sum: bool = False
    """Divide the critics' loss by the largest of its weights where that is above 1."""
    entropy: float = Field(0.0, ge=0, le=1000)
    """Weight of the policy's entropy in its objective."""
    lr_critic: float = Field(0.01, gt=0, le=1)
    """Learning rate of the critics, the fast player."""
    lr_actor: float = Field(0.001, gt=0, le=1)
    """Learning rate of the policy, the slow one; of the whole network in the baselines."""
    target_rate: float = Field(5e-3, gt=0, le=1)
    """Share of the critics that the target networks take over in each step."""
    batch: int = Field(256, ge=1, le=1_000_000)
    """Transitions per step, over all ranks."""
    warmstart_steps: int = Field(0, ge=0)
    """First steps of behaviour cloning and temporal difference alone."""
    divergence: float = Field(10.0, gt=1)
    """The critics count as diverged when a term says that values are this many times what rewards can be worth."""
    width: int = Field(64, ge=4, le=4096, multiple_of=2)
    """Width of items and states."""
    encoder: Encoder = Encoder.ATTENTION
    """attention (one block) or gru."""
    shared_encoder: bool = False
    """The policy reads the critics' states, without a gradient into them, in place of an encoder of its own."""
    diversity: float = Field(1.0, ge=0)
    """Weight of smorl's diversity head beside its reward head."""
    novelty: float = Field(1.0, ge=0)
    """Weight of smorl's novelty head."""
    chunk: int = Field(16_384, ge=1)
    """Items whose scores are held at once for a batch."""
    ranks: int = Field(1, ge=1)
    """Learner processes; with one, the learner runs in the process of the command."""
    device: Device = Device.AUTO
    """Where the learner computes; auto takes CUDA when the machine has it."""
    threads: int = Field(0, ge=0)
    """CPU threads per rank; 0 shares the machine's cores among the ranks."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of a collective between ranks, and of a call to them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % self.ranks:
            low = self.batch // self.ranks * self.ranks
            near = " or ".join(str(one) for one in (low, low + self.ranks) if one)
            raise ValueError(f"batch {self.batch} does not divide among {self.ranks} ranks; legal: {near}")
        if self.shared_encoder and self.method is not Method.LAAC:
            raise ValueError(f"shared_encoder with method {self.method.value}; legal: false, or method laac")
        return self

    def learner(self) -> LearnerSettings:
        """The ranks as every learner of windlass has them: DeepSpeed without sharding, in float32."""
        return LearnerSettings(
            ranks=self.ranks,
            zero_stage=0,
            dtype=Precision.FLOAT32,
            device=self.device,
            threads=self.threads,
            timeout_s=self.timeout_s,
            grad_clip=0.0,
            weight_decay=0.0,
        )
