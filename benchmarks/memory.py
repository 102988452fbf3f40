"""What answers take of the device while they are decoded: by the engine's books, and by CUDA's own count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aquifer.server.engine.engine import Engine

_SETTLE_SECONDS = 60.0


class DecodingMemory:
    """Device memory for KV that answers of one engine take, from when all of them have taken a step. Reading
    prompts and making documents selectable may take more.

    Both figures speak of the same steps: the engine's thread says after each of them what its books hold.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.books_bytes = 0
        """Most that the books held in the last run: pages, landmarks and all beside them."""
        self.measured_bytes = 0
        """What the engine allocated when it was built by its books, of pages and landmarks those in use; and
        what CUDA had allocated beside, recordings included. 0 without CUDA."""
        self._fixed_bytes = engine.load().device_bytes["staging"]
        self._kept_bytes = 0
        self._stayed_bytes = 0
        self._decoding = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """One run."""
        self.books_bytes = self._kept_bytes = 0
        self._decoding = False
        before, before_recorded = self._allocated(), _recorded_bytes()
        yield
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        after, recorded = self._allocated(), _recorded_bytes() - before_recorded
        if torch.cuda.is_initialized():
            beside = self._stayed_bytes + peak - before + recorded
            self.measured_bytes = self._fixed_bytes + self._kept_bytes + beside
        self._stayed_bytes += after - before + recorded

    def step_taken(self) -> None:
        """All answers of the run have taken a step. To be called on the engine's thread, after every one."""
        if not self._decoding:
            self._decoding = True
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            return
        in_use = self._engine.load().device_bytes
        kept = in_use["resident"] + in_use["landmarks"]
        self._kept_bytes = max(self._kept_bytes, kept)
        self.books_bytes = max(self.books_bytes, kept + in_use["staging"])

    def _allocated(self) -> int:
        """Bytes allocated when the engine has let go of all that its last requests held. It sends their last
        event before that."""
        if not torch.cuda.is_initialized():
            return 0
        self._engine.flush(_SETTLE_SECONDS)
        return torch.cuda.memory_allocated()


def _recorded_bytes() -> int:
    """Bytes that recordings keep for what they compute. CUDA does not count them as allocated."""
    if not torch.cuda.is_initialized():
        return 0
    own = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in own)
