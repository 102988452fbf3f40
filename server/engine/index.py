"""What selective decoding looks tokens up in: landmarks on the device, rows in host memory.

Kept in pages of one segment under the segment's key, like the KV itself, so requests about one document
share them and the next question finds them ready.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.pages import PageAllocator


class IndexPool(PageAllocator):
    """Paged landmarks and rows of all layers.

    codes: uint8 [L, P*256, C/4], scales: float16 [L, P*256, C/G], both on the device
    rows: uint8 [L, P*256, H * row bytes] in host memory: of each token the key codes of all heads, then their
        value codes, then their scales. A device that reads them over the bus gets 32 bytes at a time, at
        multiples of 32; codes of heads lie on these, rows with their scales in between would not.
    The first four slots of a prompt's first page are the sinks'; they are never looked up, because
    sinks are always attended to.
    """

    def __init__(self, codec: TokenCodec, num_pages: int, device: torch.device, *, keep: bool) -> None:
        """num_pages may be 0: then there is no selective decoding."""
        super().__init__(num_pages, keep=keep)
        self.codec = codec
        spec, slots = codec.spec, num_pages * SEGMENT_TOKENS
        code_bytes, num_scales = codec.landmark_shapes
        self.codes = torch.empty(spec.num_layers, slots, code_bytes, dtype=torch.uint8, device=device)
        self.scales = torch.empty(spec.num_layers, slots, num_scales, dtype=torch.float16, device=device)
        shape = (spec.num_layers, slots, spec.num_kv_heads * codec.row_bytes)
        self.rows = torch.empty(shape, dtype=torch.uint8)

    @property
    def used_bytes(self) -> int:
        """Device bytes of the landmarks in use."""
        return self.used_pages * SEGMENT_TOKENS * self.codec.landmark_bytes

    @property
    def capacity_bytes(self) -> int:
        """Device bytes of all landmarks."""
        return self.num_pages * SEGMENT_TOKENS * self.codec.landmark_bytes

    def write(self, layer: int, runs: Sequence[tuple[int, int]], keys: Tensor, values: Tensor) -> None:
        """Encode one layer of some tokens into the slots of `runs`.

        keys (after RoPE), values: [H, T, D], T = total length of the runs.
        """
        encoded = self.codec.encode(layer, keys.transpose(0, 1), values.transpose(0, 1))
        rows = torch.cat([part.flatten(1) for part in encoded.rows.split(self._parts, dim=2)], dim=1)
        done = 0
        for first, last in runs:
            part = slice(done, done + last - first)
            self.codes[layer, first:last] = encoded.codes[part]
            self.scales[layer, first:last] = encoded.scales[part]
            # From a device into page-locked memory, in the order of what else runs there.
            self.rows[layer, first:last].copy_(rows[part], non_blocking=True)
            done += last - first

    def read(self, layer: int, slots: Tensor, heads: Tensor) -> Tensor:
        """Rows uint8 [N, row bytes] of one layer, as the codec decodes them. slots, heads: int64 [N], on the
        host."""
        num_heads = self.codec.spec.num_kv_heads
        parts = self.rows[layer].split([num_heads * size for size in self._parts], dim=1)
        return torch.cat([part.unflatten(1, (num_heads, -1))[slots, heads] for part in parts], dim=1)

    @property
    def _parts(self) -> list[int]:
        """Bytes of one row: of its key's codes, of its value's codes, and of both scales."""
        codes, scales = self.codec.row_shapes
        return [codes, codes, 2 * scales]


def index_pages(codec: TokenCodec, row_bytes: int, device_bytes: int) -> int:
    """Pages of an index whose rows take at most row_bytes of host memory and whose landmarks at most
    device_bytes of the device."""
    spec = codec.spec
    rows_of_page = SEGMENT_TOKENS * spec.num_layers * spec.num_kv_heads * codec.row_bytes
    landmarks_of_page = SEGMENT_TOKENS * codec.landmark_bytes
    return min(row_bytes // rows_of_page, device_bytes // landmarks_of_page)
