"""The jobs that `windlass train` runs, as a union told apart by `job`.

A job is a tree of frozen sections; the owners of the parts define the sections. A check between fields lives here,
raises `RequestError` with the full name of a field, and names the legal neighbours. Checks that need the catalogue are
in `check_catalogue`, which the loop calls before it starts any process.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.errors import RequestError
from data.session_settings import SessionSettings
from data.settings import Settings
from data.settings_data import InteractionSettings, PromptSettings, RolloutDataSettings
from data.text_settings import TextSettings
from reward.settings import RewardSettings
from rollout.channel import ChannelSettings
from rollout.settings import EngineKind, RolloutSettings
from trainer.critic_settings import CriticSettings
from trainer.group_settings import GroupSettings
from trainer.laac_settings import LaacSettings
from trainer.list_checks import check_language_lists, check_list_evaluation, check_list_objective
from trainer.list_settings import ListSettings
from trainer.objective_checks import check_objective
from trainer.objective_settings import ObjectiveSettings
from trainer.ranker_settings import RankerSettings
from trainer.run_settings import (
    CheckpointSettings,
    ClusterSettings,
    EarlyStoppingSettings,
    EvaluationSettings,
    LimitSettings,
    PolicyGapSettings,
    TrackingSettings,
)
from trainer.settings import LearnerSettings
from trainer.truncation import TruncationLevel

ROW_MULTIPLE = 16
"""learner.row_tokens is a multiple of this."""
PRESETS = ("mini", "tiny", "small")
"""Model sizes that `init` can name."""


class InitEmbeddings(StrEnum):
    """Where a preset's code embeddings come from."""

    AUTO = "auto"
    """`codes` where the codes have codebooks, else `random`."""
    CODES = "codes"
    """The centres of the quantiser that made the codes, projected to the model's width."""
    RANDOM = "random"
    """Noise, like every other weight."""


class BaseJob(Settings):
    """What all jobs have."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random: data order, initial weights, sampling."""
    tracking: TrackingSettings = TrackingSettings()
    """Trackers beside metrics.jsonl and TensorBoard."""


class JobSettings(BaseJob):
    """What the jobs have that are evaluated by ranking metrics."""

    limits: LimitSettings
    """When the run ends."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Evaluation on the validation split."""
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    """Stop when the metric no longer rises."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """Which checkpoints are written and kept."""


class PolicyJobSettings(JobSettings):
    """What the jobs have that train the generative model."""

    data: PromptSettings
    """Dataset and prompts."""
    lists: ListSettings = ListSettings()
    """Ranked lists for needs; with no needs (the default) the job recommends single items."""
    text: TextSettings = TextSettings()
    """A pretrained language model as the recommender, with items as codes or as titles; off by default."""
    init: str = Field("tiny", min_length=1)
    """Where the weights come from: a preset (mini, tiny, small: random weights), an hf, checkpoint or run folder, or,
    with `text.items`, the folder or GGUF file of a pretrained language model, or `smollm2-135m`, which is a package."""
    init_embeddings: InitEmbeddings = InitEmbeddings.AUTO
    """Code embeddings of a preset: codes (the quantiser's centres), random, or auto (codes where they are there)."""
    learner: LearnerSettings = LearnerSettings()
    """The DeepSpeed learners."""
    rollout: RolloutSettings = RolloutSettings()
    """The fleet of engines (for evaluation, and for rollouts in `rl`)."""
    weights: ChannelSettings = ChannelSettings()
    """How new weights reach the fleet."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""
    feedback: Path | None = None
    """Feedback log that is trained on in place of the training split: `rl` takes its requests as prompts
    (objective.anchor), `sft` its responses as targets."""
    feedback_catalogues: tuple[str, ...] = ()
    """Digests of further catalogues that number the same items, whose rows of the log are used as well: this one's
    before some of its items were retired. The present one and the one without retirements need not be named."""

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.text.on and self.init in PRESETS:
            legal = "the folder or GGUF file of a pretrained language model, or a run that began with one"
            raise RequestError("init", self.init, f"{legal} (text.items is {self.text.items})")
        check_language_lists(self.lists, self.text)
        if self.init_embeddings is InitEmbeddings.CODES and self.init not in PRESETS:
            raise RequestError("init_embeddings", "codes", f"auto, or init one of {', '.join(PRESETS)}")
        if self.learner.lora.alone:
            self._check_adapter_push()
        prompt = self.data.max_prompt_tokens
        if self.learner.row_tokens <= prompt:
            raise RequestError(
                "learner.row_tokens",
                self.learner.row_tokens,
                f"{next_row(prompt + 1)} or more (above data.max_prompt_tokens, {prompt}), or a lower "
                "data.max_prompt_tokens",
            )
        longest = self.rollout.max_model_len
        if longest is not None and longest <= prompt:
            raise RequestError("rollout.max_model_len", longest, f"more than data.max_prompt_tokens, {prompt}, or null")
        if self.lists.on:
            check_list_evaluation(self.lists, self.evaluation, logged=self.feedback is not None)
        if self.cluster.colocated:
            self._check_colocated()
        return self

    def _check_adapter_push(self) -> None:
        for where, found, legal in (
            ("rollout.engine", self.rollout.engine, EngineKind.VLLM),
            ("rollout.tensor_parallel", self.rollout.tensor_parallel, 1),
            ("rollout.adapter", self.rollout.adapter, None),
        ):
            if found != legal:
                raise RequestError(where, found, f"{legal}, or learner.lora.push: merged")

    def _check_colocated(self) -> None:
        ranks, rollout = self.learner.ranks, self.rollout
        if rollout.engines != ranks:
            raise RequestError("rollout.engines", rollout.engines, f"{ranks} like learner.ranks with cluster.colocated")
        if rollout.tensor_parallel != 1:
            raise RequestError("rollout.tensor_parallel", rollout.tensor_parallel, "1 with cluster.colocated")
        if self.cluster.learner_node not in (None, self.cluster.engine_node):
            legal = "none, or cluster.engine_node, with cluster.colocated: each rank is beside its engine"
            raise RequestError("cluster.learner_node", self.cluster.learner_node, legal)
        if rollout.gpus and rollout.gpus + self.learner.gpus > 1:
            legal = (
                f"0, or at most {1 - self.learner.gpus:g} with cluster.colocated: learner.gpus is {self.learner.gpus:g}"
            )
            raise RequestError("rollout.gpus", rollout.gpus, legal)


class SftJob(PolicyJobSettings):
    """Supervised training on whole sequences, or on the responses of a log, with the full-vocabulary NLL."""

    job: Literal["sft"] = "sft"
    """Kind of job."""
    batch_rows: int = Field(64, ge=1)
    """Sequence windows per optimiser step, over all ranks."""


class RlJob(PolicyJobSettings):
    """GRPO on rollouts of the current policy."""

    job: Literal["rl"] = "rl"
    """Kind of job."""
    data: RolloutDataSettings
    """Dataset and prompts."""
    batch_prompts: int = Field(64, ge=1)
    """Prompts per rollout batch; a multiple of objective.minibatches and of rollout.shard_size."""
    reward: RewardSettings = RewardSettings()
    """The reward service."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Updates between the weights that generate a batch and those it trains: 0 rolls out and learns in turn, exactly
    on-policy; k collects the batches of the next k steps while the learners work (objective.truncation corrects)."""
    group: GroupSettings = GroupSettings()
    """What joins the groups, and which are worth a step."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """GRPO and its switches."""
    policy_gap: PolicyGapSettings = PolicyGapSettings()
    """Alarm on the gap between engine and learner."""
    rollout_only: Path | None = None
    """Only generate and score groups, and dump them to this folder as Parquet; nothing is trained."""
    train_only: Path | None = None
    """Train on the groups that `rollout_only` dumped to this folder; no engine is started."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        check_divides("batch_prompts", self.batch_prompts, "objective.minibatches", self.objective.minibatches)
        check_divides("batch_prompts", self.batch_prompts, "rollout.shard_size", self.rollout.shard_size)
        if self.rollout.width < 2:
            raise RequestError("rollout.width", self.rollout.width, "2 or more: a group of one has no advantage")
        if self.rollout_only is not None and self.train_only is not None:
            raise RequestError("train_only", self.train_only, "only one of rollout_only and train_only")
        check_objective(
            self.objective,
            self.rollout,
            self.reward,
            self.group,
            batch_prompts=self.batch_prompts,
            feedback=self.feedback,
            dumps=self.rollout_only is not None or self.train_only is not None,
            lists=self.lists.on,
        )
        if self.lists.on:
            self._check_lists()
        if self.max_staleness:
            self._check_staleness()
        if self.feedback is not None and (self.train_only is not None or self.rollout_only is not None):
            raise RequestError("feedback", self.feedback, "none with rollout_only or train_only: dumps hold no log")
        if self.learner.dtype.value != self.rollout.dtype.value and self.policy_gap.limit is None:
            raise RequestError(
                "rollout.dtype",
                self.rollout.dtype.value,
                f"{self.learner.dtype.value} like learner.dtype, or policy_gap.limit set for the mixed pair",
            )
        return self

    def _check_lists(self) -> None:
        dumps = self.rollout_only is not None or self.train_only is not None
        check_list_objective(self, dumps=dumps)

    def _check_staleness(self) -> None:
        if self.cluster.colocated:
            raise RequestError("max_staleness", self.max_staleness, "0 with cluster.colocated: both work in turn")
        if self.rollout.sleeps:
            raise RequestError("max_staleness", self.max_staleness, "0 with rollout.sleeps: both work in turn")
        if self.rollout_only is not None or self.train_only is not None:
            raise RequestError("max_staleness", self.max_staleness, "0 with rollout_only or train_only")
        if self.objective.truncation.level is TruncationLevel.NONE:
            levels = ", ".join(level for level in TruncationLevel if level is not TruncationLevel.NONE)
            raise RequestError(
                "objective.truncation.level",
                "none",
                f"{levels}: with max_staleness {self.max_staleness} the groups come from earlier weights",
            )


class RankerJob(JobSettings):
    """A ranker for rewards and baselines, trained on whole sequences."""

    job: Literal["ranker"] = "ranker"
    """Kind of job."""
    limits: LimitSettings = LimitSettings(max_epochs=500)
    """When the training of a network ends; counted rankers need none."""
    data: InteractionSettings
    """Dataset and history."""
    ranker: RankerSettings = RankerSettings()
    """The ranker and its training."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.evaluation.scores.rows:
            raise RequestError("evaluation.scores.rows", self.evaluation.scores.rows, "0: a ranker job scores no paths")
        if self.evaluation.feedback is not None:
            legal = "none: a ranker job measures no exposure bias"
            raise RequestError("evaluation.feedback", self.evaluation.feedback, legal)
        return self


class CriticJob(BaseJob):
    """A critic of gains that nobody observed, for ranked lists."""

    job: Literal["critic"] = "critic"
    """Kind of job."""
    data: PromptSettings
    """Dataset and prompts, as those of the policy: the critic reads the same histories and candidates."""
    lists: ListSettings
    """Needs, candidates and feedback, as those of the policy."""
    critic: CriticSettings = CriticSettings()
    """The networks and their training."""

    @model_validator(mode="after")
    def _own_users(self) -> Self:
        self.lists.loaded_needs()
        if not self.lists.critic_users:
            raise RequestError("lists.critic_users", 0.0, "a share above 0: the users that a critic is trained on")
        return self


class LaacJob(JobSettings):
    """A light actor-critic on logged sessions, guided by a reference policy, or one of its baselines."""

    job: Literal["laac"] = "laac"
    """Kind of job."""
    limits: LimitSettings = LimitSettings(max_steps=10_000)
    """When the training ends."""
    data: SessionSettings
    """Dataset, users, rewards and split."""
    laac: LaacSettings = LaacSettings()
    """Method, reference, objective and learner."""
    rollout: RolloutSettings = RolloutSettings()
    """The fleet that answers for the reference."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster, where processes are started."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        unused = (
            ("evaluation.scores.rows", self.evaluation.scores.rows, 0),
            ("evaluation.feedback", self.evaluation.feedback, None),
            ("evaluation.unconstrained_rows", self.evaluation.unconstrained_rows, 0),
            ("evaluation.test_rows", self.evaluation.test_rows, 0),
            ("limits.max_epochs", self.limits.max_epochs, None),
        )
        for name, found, legal in unused:
            if found != legal:
                told = "none" if legal is None else legal
                raise RequestError(name, found, f"{told}: a laac job counts steps and evaluates all test rows itself")
        return self


Job = Annotated[SftJob | RlJob | RankerJob | CriticJob | LaacJob, Field(discriminator="job")]
JOBS: dict[str, type[BaseJob]] = {
    "sft": SftJob,
    "rl": RlJob,
    "ranker": RankerJob,
    "critic": CriticJob,
    "laac": LaacJob,
}


def neighbours(value: int, divisor: int) -> str:
    """The multiples of `divisor` (at least 1) around `value`, as words."""
    low = value // divisor * divisor
    return f"{low} or {low + divisor}" if low else str(divisor)


def check_divides(where: str, value: int, divisor_name: str, divisor: int) -> None:
    """Refuse a value that is no multiple of the divisor, naming both neighbours."""
    if value % divisor:
        raise RequestError(where, value, f"{neighbours(value, divisor)} (a multiple of {divisor_name}, {divisor})")


def next_row(tokens: int) -> int:
    """The smallest legal row length of at least `tokens`."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE
