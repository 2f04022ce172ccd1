"""Batches of many Parquet files, read ahead by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from data.parquet import READ_ERRORS, first_line
from launch.continual.log_folder import UnusableFile
from launch.continual.reasons import Reason, Told

BATCH_ROWS: Final = 1 << 16
Opener = Callable[[], pq.ParquetFile]


def batches(files: Sequence[Opener], columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The batches of all files; the next one is read while the present one is worked on."""
    # A file that was read keeps its decoders, so that each is opened for its turn only.
    source = (batch for opened in files for batch in opened().iter_batches(BATCH_ROWS, columns=columns))
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, source, None)
        while True:
            try:
                batch = ahead.result()
            except READ_ERRORS as error:
                raise UnusableFile(Told(reason=Reason.DAMAGED_FILE, found=first_line(error))) from error
            if batch is None:
                return
            ahead = reader.submit(next, source, None)
            yield batch
