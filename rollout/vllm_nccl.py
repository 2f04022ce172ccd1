"""The communicator of vLLM's own `nccl` weight transfer, as the process group of a mover.

vLLM's transfer is that communicator (`PyNcclCommunicator`, built from a unique id) and a packing of tensors. Packing,
checksums and rendezvous are ours, as with every mover: rank 0 draws the id and the others read its 128 bytes from the
mover's store, so nothing is unpickled, as vLLM's rendezvous by TCP would.

Shares everything else with the gloo and NCCL movers. Without a GPU a test covers the exchange of the id and the order
of the calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout import vllm_internals as internals

ID_KEY = "nccl-id"


@dataclass(frozen=True)
class StreamWork:
    """A broadcast under way on a stream of its own."""

    event: Any

    def is_completed(self) -> bool:
        """Whether it is over."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Return when it is over."""
        self.event.synchronize()


class VllmNcclGroup:
    """What `rollout.collective_movers` needs of a process group; built by all ranks at once."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device) -> None:
        """
        Raises:
            RequestError: vLLM's NCCL is switched off in this process.
        """
        if rank == 0:
            store.set(ID_KEY, internals.nccl_unique_id())
        # The others wait here for rank 0, as long as the store's timeout.
        self._communicator = internals.nccl_communicator(bytes(store.get(ID_KEY)), rank, size, device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> StreamWork:
        """Begin to send a tensor from `options.rootRank` to all ranks."""
        # The buffer was filled on the present stream.
        self._stream.wait_stream(torch.cuda.current_stream())
        self._communicator.broadcast(tensors[0], src=options.rootRank, stream=self._stream)
        return StreamWork(self._stream.record_event())

    def abort(self) -> None:
        """End the communicator, which nothing else does; broadcasts under way fail."""
        self._communicator.destroy()
