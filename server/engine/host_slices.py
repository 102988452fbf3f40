"""Where stored bytes lie in host memory, for a device that reads them there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aquifer.compression.codec import Codec
from aquifer.kernels.triton.gather import gather_slices
from aquifer.server.engine.host_memory import to_device
from aquifer.server.engine.records import as_tensor

_LARGEST_LAYER = 2**31

GATHER_PROGRAMS = 8
"""As many multiprocessors are lost to the GEMMs. Beside those, bytes from the host take four times as long to
arrive, so that half a megabyte has to be asked for at a time (gather.py)."""


class HostRecords:
    """The bodies of some records at addresses that a device can read."""

    def __init__(self, bodies: Sequence[memoryview], device: torch.device) -> None:
        """bodies: of bytes; they must stay as they are, and this object must live, until the device has read
        them. Those that are not page-locked are copied to memory that is."""
        self._device = device
        self._bodies = [as_tensor(body) for body in bodies]
        if device.type == "cuda":
            self._page_lock([body.obj for body in bodies])

    @property
    def addresses(self) -> list[int]:
        return [body.data_ptr() for body in self._bodies]

    def on_device(self) -> Tensor:
        """The addresses, int64 [N]."""
        return to_device(torch.tensor(self.addresses), self._device)

    def _page_lock(self, owners: Sequence[object]) -> None:
        """owners: of the bodies' memory, each of which is page-locked as a whole or not at all."""
        by_owner = {id(owner): body for owner, body in zip(owners, self._bodies, strict=True)}
        locked = {number for number, body in by_owner.items() if body.is_pinned()}
        elsewhere = [number for number, owner in enumerate(owners) if id(owner) not in locked]
        if elsewhere:
            sizes = [-(-self._bodies[number].numel() // 256) * 256 for number in elsewhere]
            memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
            for number, room in zip(elsewhere, memory.split(sizes), strict=True):
                body = self._bodies[number]
                self._bodies[number] = room[: body.numel()].copy_(body)


class HostSlices:
    """The layers of several records, each cut out of all of them."""

    def __init__(self, codec: Codec, counts: Sequence[int], records: Tensor) -> None:
        """counts: tokens of each record. records: int64 [N], their addresses, on the device; 0 for one that
        is not there."""
        layers = range(codec.spec.num_layers)
        of_count = {n: [codec.layer_bytes(layer, n) for layer in layers] for n in set(counts)}
        sizes = torch.tensor([of_count[n] for n in counts]).T  # [L, N]
        self._largest: list[int] = sizes.amax(1).tolist()
        self.layer_bytes: list[int] = sizes.sum(1).tolist()
        """Bytes of each layer of all records."""
        if max(self.layer_bytes) >= _LARGEST_LAYER:
            raise ValueError(f"{len(counts)} records at once are too many for 32-bit offsets")
        tables = torch.stack((sizes.cumsum(0) - sizes, sizes.cumsum(1) - sizes, sizes)).int()
        self._records = records
        self.layout = to_device(tables, records.device)
        """int32 [3, L, N]: where slices begin in their records, where they go, and their sizes."""

    @property
    def tables(self) -> Sequence[Tensor]:
        """Device memory that a copy reads."""
        return self._records, self.layout

    def land(self, layer: int, target: Tensor) -> None:
        """Start copying a layer into target, the slices of all records end to end."""
        starts, places, sizes = self.layout[:, layer]
        largest = self._largest[layer]
        gather_slices(self._records, starts, places, sizes, largest, target, programs=GATHER_PROGRAMS)
