"""The `reward` section of a job: what is rewarded, who scores it, and what happens when that fails."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from data.errors import RequestError
from data.settings import Settings
from reward.swap_evaluation import SwapSampling

THERE = "there"
"""`reward.list_ranker` of a service that runs elsewhere and has one."""


class Transport(StrEnum):
    """How the training loop reaches the reward service."""

    HANDLE = "handle"
    """A Ray Serve handle: arrays travel through the object store."""
    HTTP = "http"
    """POST /score, as any other client."""


class RankerTransform(StrEnum):
    """What is done with ranker scores before they become rewards."""

    RAW = "raw"
    """Nothing."""
    SIGMOID = "sigmoid"
    """1 / (1 + exp(-score))."""
    PERCENTILE = "percentile"
    """Share of the other distinct items of the group that score lower (half for ties), in 0 to 1."""


class InvalidScore(StrEnum):
    """The ranker score of a completion that is no item of the catalogue."""

    LOWEST = "lowest"
    """The lowest of its group."""
    BELOW_LOWEST = "below_lowest"
    """The lowest of its group minus one standard deviation of the group (AdaGRPO)."""


class RewardSettings(Settings):
    """Rewards and the service that scores. The reward of a completion is the weighted sum of its sources."""

    item_match: float = Field(1.0, ge=-1000, le=1000)
    """Weight of 1 for a completion that is the ground truth item (or shares its path), 0 otherwise."""
    rank_penalty: float = Field(1.0, ge=-1000, le=1000)
    """Weight of ReRe's penalty of the misses in a group that has the hit; the higher a miss ranks, the larger."""
    ranker_score: float = Field(0.0, ge=-1000, le=1000)
    """Weight of the ranker's score of the item. With 0 a ranker that is set is still asked, for the metrics."""
    feedback: float = Field(0.0, ge=0, le=1000)
    """Weight of the feedback reward of a log's exposed item; for objective.anchor."""
    ranker: str | None = None
    """An artefact folder written by `windlass train`, a .onnx file, or `package.module:Class`; none: no service."""
    ranker_options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Keyword arguments for a ranker class or an .onnx file."""
    ranker_transform: RankerTransform = RankerTransform.RAW
    """raw, sigmoid, or percentile (within the group)."""
    invalid_score: InvalidScore = InvalidScore.LOWEST
    """Ranker score of a completion that is no item: lowest of the group, or below_lowest by one deviation."""
    list_ranker: str | None = None
    """`package.module:Class` of a list-wise ranker (score_list), which the service asks for swaps to credit lists; with
    reward.url `there`: the service has its own; none takes the closed form from the gains."""
    list_ranker_options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Keyword arguments of that class."""
    swaps: SwapSampling = SwapSampling()
    """Which swaps a list-wise ranker is asked for."""
    transport: Transport = Transport.HANDLE
    """How the loop calls the service: handle or http."""
    url: str | None = Field(None, pattern=r"^https?://")
    """Base address of a reward service that runs elsewhere; none starts one in this cluster."""
    host: str = "127.0.0.1"
    """Address the service listens on. Any address but a loopback one requires the token."""
    port: int = Field(0, ge=0, le=65535)
    """Port the service listens on; 0 takes a free one."""
    token_env: str = Field("WINDLASS_REWARD_TOKEN", min_length=1)
    """Environment variable with the bearer token; the token itself never enters a configuration file."""
    replicas: int = Field(1, ge=1, le=1024)
    """Processes that score."""
    threads: int = Field(1, ge=1, le=256)
    """Compute threads per replica."""
    num_cpus: float = Field(1.0, ge=0, le=256)
    """Logical Ray CPUs per replica."""
    num_gpus: float = Field(0.0, ge=0, le=16)
    """Ray GPUs per replica."""
    chunk: int = Field(64, ge=1, le=65536)
    """Samples per ranker call; the last chunk is padded, so every call has the same size."""
    deadline_s: float = Field(60.0, gt=0, le=86400)
    """Seconds one attempt at scoring a batch may take."""
    retries: int = Field(2, ge=0, le=100)
    """Further attempts after a timeout, a lost replica or an error of the ranker."""
    backoff_s: float = Field(0.5, ge=0, le=600)
    """Pause before the first further attempt; doubles with each."""
    max_body_mib: float = Field(32.0, gt=0, le=4096)
    """Largest HTTP request body, MiB."""
    max_failed_share: float = Field(0.2, ge=0, le=1)
    """A step with a larger share of failed groups stops the run (after a checkpoint)."""
    max_failed_steps: int = Field(3, ge=1)
    """This many steps in a row with any failed group stop the run (after a checkpoint)."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.ranker_score and self.ranker is None and self.url is None:
            raise RequestError(
                "reward.ranker", "none", f"a ranker or reward.url, because reward.ranker_score is {self.ranker_score}"
            )
        if self.url is not None and self.ranker is not None:
            raise RequestError("reward.url", self.url, "none with reward.ranker set: the service there has its own")
        if self.list_ranker is not None and (self.list_ranker == THERE) != (self.url is not None):
            legal = f"{THERE} with reward.url, package.module:Class without it"
            raise RequestError("reward.list_ranker", self.list_ranker, legal)
        return self

    def part_weights(self) -> dict[str, float]:
        """Weight of each source by its name in `ScoredGroups.parts_PG`."""
        return {
            "item_match": self.item_match,
            "rank_penalty": self.rank_penalty,
            "ranker_score": self.ranker_score,
        }

    @property
    def asks_ranker(self) -> bool:
        """True when a step asks the reward service for scores of items."""
        return self.ranker is not None or (self.url is not None and self.list_ranker is None)

    @property
    def asks_service(self) -> bool:
        """True when a step needs the reward service."""
        return self.asks_ranker or self.list_ranker is not None
