"""The ranks of LAAC's learner as the driver sees them (`trainer.rank_group`)."""

from __future__ import annotations

from typing import Any

from trainer.laac_learner import LaacLearner
from trainer.laac_settings import LaacSettings
from trainer.rank_group import RankActor, RankGroup
from trainer.ranks import RankPlace


class LaacActor(RankActor):
    """A rank in a process of its own."""

    def make(self, arguments: dict[str, Any], place: RankPlace) -> LaacLearner:
        """The learner."""
        return LaacLearner(**arguments, place=place)


class LaacGroup(RankGroup):
    """All ranks."""

    @classmethod
    def open(cls, settings: LaacSettings, arguments: dict[str, Any]) -> LaacGroup:
        """The ranks: one inside this process, or as many Ray actors as `laac.ranks` says; Ray is initialised then.

        Args:
            settings: the section `laac`.
            arguments: of every `LaacLearner`.

        Raises:
            RequestError: the cluster can never give the ranks.
            RunError: a rank failed.
        """
        if settings.ranks == 1:
            return cls(settings.learner(), LaacLearner(**arguments), [])
        return cls.start_ranks(settings.learner(), LaacActor, arguments)

    def run(self, steps: int) -> dict[str, float]:
        """Take so many steps; returns the means of their terms.

        Raises:
            DivergedError: a term is not finite, or beyond what rewards can be worth.
        """
        found: dict[str, float] = self._all("run", steps)[0]
        return found

    def weights(self, player: str) -> dict[str, Any]:
        """Weights of a module by name."""
        found: dict[str, Any] = self._all("weights", player)[0]
        return found
