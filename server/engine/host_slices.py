"""Where stored bytes lie in host memory, for a device that reads them there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aquifer.compression.codec import Codec
from aquifer.kernels.triton.gather import gather_slices
from aquifer.server.engine.fetch import StoredRecord
from aquifer.server.engine.host_memory import to_device
from aquifer.server.engine.records import as_tensor

_LARGEST_LAYER = 2**31

GATHER_PROGRAMS = 8
"""As many multiprocessors are lost to the GEMMs. Beside those, bytes from the host take four times as long to
arrive, so that half a megabyte has to be asked for at a time (gather.py)."""


class HostRecords:
    """The bodies of some records at addresses that a device can read."""

    def __init__(self, records: Sequence[StoredRecord], device: torch.device) -> None:
        """records: must stay as they are, and this object must live, until the device has read them. Those
        that lie elsewhere than in the arena are copied, on CUDA to memory that is page-locked."""
        self._device = device
        self.addresses = [record.address or 0 for record in records]
        elsewhere = [number for number, address in enumerate(self.addresses) if not address]
        if elsewhere:
            bodies = [as_tensor(records[number].body) for number in elsewhere]
            sizes = [-(-body.numel() // 256) * 256 for body in bodies]
            self._copies = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
            for number, body, room in zip(elsewhere, bodies, self._copies.split(sizes), strict=True):
                self.addresses[number] = room[: body.numel()].copy_(body).data_ptr()

    def on_device(self) -> Tensor:
        """The addresses, int64 [N]."""
        return to_device(torch.tensor(self.addresses), self._device)


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
