"""Files of responses of a day, sorted on disk by their requests, so that any number of them can be joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from data.responses import RESPONSES, DigestArray, Responses, packed
from launch.continual.log_folder import Listing, LogFolder
from launch.continual.parquet_stream import batches
from launch.continual.requests import Buckets, mapped

DIGESTS: Final = "answers.digest.u64"
WORDS: Final = "answers.word.u64"


@contextmanager
def joined_responses(
    log: LogFolder, listing: Listing, folder: Path, response_range: tuple[float, float]
) -> Iterator[tuple[Responses, Counter[str]]]:
    """All responses of a day, and those that were left out by `data.responses.ResponseFault`.

    Args:
        log: where they lie.
        listing: of the day.
        folder: for temporary files, which are removed.
        response_range: of a sound response.

    Raises:
        UnusableFile: a file that cannot be read or has another schema.
    """
    files = [partial(log.responses, listing.day, name.partition("/")[2]) for name in listing.responses]
    counts: Counter[str] = Counter()
    digests, words = folder / DIGESTS, folder / WORDS
    with Buckets(folder, sum(opened().metadata.num_rows for opened in files), name="answers") as buckets:
        for batch in batches(files, RESPONSES.names):
            pair_R, left_out = packed(batch, response_range)
            counts += left_out
            buckets.add_pairs(pair_R)
        with digests.open("wb") as first, words.open("wb") as second:
            for pair_R in buckets.sorted():
                pair_R[:, 0].copy().tofile(first)
                pair_R[:, 1].copy().tofile(second)

    def opened_words() -> tuple[DigestArray, DigestArray]:
        return np.asarray(mapped(digests)), np.asarray(mapped(words))

    try:
        yield Responses(opened_words), counts
    finally:
        for path in (digests, words):
            path.unlink()
