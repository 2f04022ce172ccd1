"""A ranker somebody already has in production, run by ONNX Runtime.

The model takes `history` int64 `[B, S]` and `candidates` int64 `[B, C]`, optionally `length` int64 `[B]` (items in
each history), and returns `[B, C]` scores as its first output. Other input names are options. Axes may be dynamic or
fixed: a fixed B is the rows of a call, a fixed S the length of histories; a fixed C is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import RequestError
from data.records import FloatArray, IntArray


class OnnxRanker:
    """An ONNX Runtime session behind the ranker interface."""

    def __init__(
        self,
        session: Any,
        *,
        history: str = "history",
        candidates: str = "candidates",
        length: str = "length",
        max_history: int = 50,
        rows: int = 64,
        padding: int = 0,
        pad_left: bool = False,
        item_offset: int = 0,
        where: str = "model",
    ) -> None:
        """Wrap an onnxruntime session.

        Args:
            session: `onnxruntime.InferenceSession`.
            history: name of the history input.
            candidates: name of the candidates input.
            length: name of the length input, used when the model has it.
            max_history: most recent items that are passed.
            rows: rows of a call where the model leaves it open; calls are padded to it.
            padding: id that pads histories and candidates, after the offset.
            pad_left: padding before the history instead of behind it.
            item_offset: added to item ids (1 where the model keeps 0 for padding).
            where: name of the model in errors.
        """
        shapes = {node.name: node.shape for node in session.get_inputs()}
        for name in (history, candidates):
            if name not in shapes:
                raise RequestError(f"{where}: input {name}", "missing", f"the inputs of the model: {sorted(shapes)}")
            if len(shapes[name]) != 2:
                raise RequestError(f"{where}: input {name}", f"shape {shapes[name]}", "two axes: rows, items")
        unknown = set(shapes) - {history, candidates, length}
        if unknown:
            raise RequestError(f"{where}: inputs", sorted(unknown), f"{history}, {candidates} and {length} only")
        if isinstance(shapes[candidates][1], int):
            raise RequestError(f"{where}: input {candidates}", f"shape {shapes[candidates]}", "a dynamic second axis")
        fixed_rows, fixed_steps = shapes[history]
        self.session = session
        self.names = (history, candidates, length if length in shapes else None)
        self.rows = fixed_rows if isinstance(fixed_rows, int) else rows
        self.steps = fixed_steps if isinstance(fixed_steps, int) else max_history
        self.padding = padding
        self.pad_left = pad_left
        self.item_offset = item_offset
        self.where = where

    @classmethod
    def from_file(cls, path: Path, *, threads: int = 1, **options: Any) -> OnnxRanker:
        """Load a `.onnx` file; it runs on `threads` threads of the CPU, or on CUDA where ONNX Runtime has it.

        Raises:
            RequestError: no such file, not a model, onnxruntime not installed, or inputs that do not fit.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise RequestError("ranker", str(path), "onnxruntime installed (the extra `onnx`)") from error
        if not path.is_file():
            raise RequestError("ranker", str(path), "an existing .onnx file")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        state = onnxruntime.capi.onnxruntime_pybind11_state
        broken = (state.Fail, state.InvalidProtobuf, state.InvalidGraph, state.InvalidArgument, state.NotImplemented)
        try:
            session = onnxruntime.InferenceSession(
                str(path), sess_options=settings, providers=onnxruntime.get_available_providers()
            )
        except broken as error:
            reason = " ".join(str(error).split())
            raise RequestError("ranker", str(path), f"a model that ONNX Runtime can run ({reason})") from error
        try:
            return cls(session, where=str(path), **options)
        except TypeError as error:
            raise RequestError("ranker_options", options, f"keyword arguments of OnnxRanker ({error})") from error

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """See `reward.ranker.Ranker`. Candidates are padded to the longest of the call."""
        scores: list[FloatArray] = []
        width = max((len(row) for row in candidates), default=0)
        for first in range(0, len(histories), self.rows):
            part = slice(first, first + self.rows)
            scores += self._score_rows(histories[part], candidates[part], width)
        return scores

    def _score_rows(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray], width: int
    ) -> list[FloatArray]:
        history_BS = np.full((self.rows, self.steps), self.padding, np.int64)
        candidate_BC = np.full((self.rows, width), self.padding, np.int64)
        length_B = np.zeros(self.rows, np.int64)
        for row, (history, wanted) in enumerate(zip(histories, candidates, strict=True)):
            kept = np.asarray(history)[-self.steps :]
            columns = slice(self.steps - len(kept), None) if self.pad_left else slice(0, len(kept))
            history_BS[row, columns] = kept + self.item_offset
            candidate_BC[row, : len(wanted)] = np.asarray(wanted) + self.item_offset
            length_B[row] = len(kept)
        history_name, candidates_name, length_name = self.names
        feed: dict[str, np.ndarray] = {history_name: history_BS, candidates_name: candidate_BC}
        if length_name is not None:
            feed[length_name] = length_B
        score_BC = np.asarray(self.session.run(None, feed)[0])
        if score_BC.shape != candidate_BC.shape:
            raise ValueError(f"{self.where}: scores of shape {score_BC.shape}, wanted {candidate_BC.shape}")
        return [score_BC[row, : len(wanted)].astype(np.float32) for row, wanted in enumerate(candidates)]
