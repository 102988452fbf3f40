"""Host memory that a device copies from, and reads in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog
import torch
from torch import Tensor

log = structlog.get_logger(__name__)

recording = threading.Lock()
"""Held while a graph is recorded: a process records one at a time, whichever engine wants it. Held, too, by
whoever waits for the whole device while others may record: CUDA would refuse, and their recording fail."""


def page_lock(memory: Tensor) -> Callable[[], None]:
    """Page-lock host memory, so that the device copies from it at full speed and asynchronously.

    Returns what undoes it. That must be called before the memory is given back: the driver would go on
    reading the old pages for whatever lies at these addresses next. Registered rather than allocated by
    torch, whose allocator would round gigabytes up to the next power of two. Raises OSError if the system
    refuses.
    """
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status != 0:
        raise OSError(
            f"{memory.nbytes:,} bytes of host memory could not be page-locked (CUDA error {status}); lower "
            "AQUIFER_RAM_BYTES or AQUIFER_SELECTIVE_RAM_BYTES, or raise the locked memory (ulimit -l)"
        )
    return lambda: runtime.cudaHostUnregister(memory.data_ptr())


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host, for which nobody waits; on a CPU the tensor itself."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def until_read(device: torch.device) -> None:
    """Wait for all that was asked of a CUDA device on the current stream: then leases of the host memory that
    it reads may end, and page-locked copies be freed. A CPU has read it already."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def until_idle(device: torch.device) -> None:
    """Wait for all queues of a CUDA device: of work that failed halfway, some may be in queues that the
    current stream does not wait for, and still read host memory."""
    if device.type != "cuda":
        return
    try:
        with recording:
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # it does nothing any more, then
        log.error("the device failed", exc_info=error)


def lock_for(device: torch.device, memories: Sequence[Tensor]) -> Callable[[], None]:
    """Page-lock what a CUDA device will read; nothing for a CPU. Returns what undoes it, when the device
    reads nothing any more."""
    unlocks = [page_lock(memory) for memory in memories if memory.numel() and device.type == "cuda"]

    def undo() -> None:
        if unlocks:
            until_idle(device)  # nothing may be reading it any more
        for unlock in unlocks:
            unlock()

    return undo
