"""Learner ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.requirements import require
from tests.trainer.rank_pair import RankPair


@pytest.fixture(scope="package")
def rank_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    """Two ranks in processes of their own."""
    require("deepspeed")
    pair = RankPair(tmp_path_factory.mktemp("rank_pair"))
    yield pair
    pair.close()
