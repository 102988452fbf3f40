"""What selective decoding looks tokens up in: landmarks on the device, rows in host memory.

Scales of rows stay on the device, too. Then what a token and head need from the host is one run of bytes, as
long as a line of the device's cache where heads are 128 wide: what limits a fetch is the number of reads.

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

    codes: uint8 [L, P*256, C/4], scales: float16 [L, P*256, C/G], of landmarks; row_scales: uint8 [L, P*256,
        H * scale bytes], of each token those of its rows, head by head; all on the device
    rows: uint8 [L, P*256, H * row bytes] in host memory: of each token, head by head, its key's codes and its
        value's codes
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
        row_codes, row_scales = _row_parts(codec)
        per_layer = (spec.num_layers, slots)
        self.row_scales = torch.empty(
            *per_layer, spec.num_kv_heads * row_scales, dtype=torch.uint8, device=device
        )
        self.rows = torch.empty(*per_layer, spec.num_kv_heads * row_codes, dtype=torch.uint8)

    @property
    def used_bytes(self) -> int:
        """Device bytes of the pages in use."""
        return self.used_pages * SEGMENT_TOKENS * _device_bytes(self.codec)

    @property
    def capacity_bytes(self) -> int:
        """Device bytes of all pages."""
        return self.num_pages * SEGMENT_TOKENS * _device_bytes(self.codec)

    @property
    def row_bytes(self) -> int:
        """Bytes that travel when the row of one token and head is fetched."""
        return _row_parts(self.codec)[0]

    def write(self, layer: int, runs: Sequence[tuple[int, int]], keys: Tensor, values: Tensor) -> Tensor:
        """Encode one layer of some tokens into the slots of `runs`.

        keys (after RoPE), values: [H, T, D], T = total length of the runs. Returns the rows as they go to the
        host, uint8 [T, H * row bytes] on the device.
        """
        encoded = self.codec.encode(layer, keys.transpose(0, 1), values.transpose(0, 1))
        codes, scales = encoded.rows.split(_row_parts(self.codec), dim=2)
        rows, row_scales = codes.flatten(1).contiguous(), scales.flatten(1)
        done = 0
        for first, last in runs:
            part = slice(done, done + last - first)
            self.codes[layer, first:last] = encoded.codes[part]
            self.scales[layer, first:last] = encoded.scales[part]
            self.row_scales[layer, first:last] = row_scales[part]
            # From a device into page-locked memory, in the order of what else runs there.
            self.rows[layer, first:last].copy_(rows[part], non_blocking=True)
            done += last - first
        return rows

    def read_codes(self, layer: int, slots: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of keys and of values from host memory, uint8 [N, bytes] each, on the device. slots, heads:
        int64 [N]."""
        rows = self.rows[layer].unflatten(1, (self.codec.spec.num_kv_heads, -1))
        host = self.rows.device
        keys, values = rows[slots.to(host), heads.to(host)].to(slots.device).chunk(2, dim=1)
        return keys, values

    def read_scales(self, layer: int, slots: Tensor, heads: Tensor) -> Tensor:
        """Scales of keys and values, uint8 [N, bytes]. slots, heads: int64 [N]."""
        return self.row_scales[layer].unflatten(1, (self.codec.spec.num_kv_heads, -1))[slots, heads]


def _row_parts(codec: TokenCodec) -> list[int]:
    """Bytes of the codes and of the scales of one token and head, for its key and its value together."""
    return [2 * size for size in codec.row_shapes]


def _device_bytes(codec: TokenCodec) -> int:
    """Of one token, all layers: its landmarks and the scales of its rows."""
    return codec.landmark_bytes + codec.spec.num_layers * codec.spec.num_kv_heads * _row_parts(codec)[1]


def index_pages(codec: TokenCodec, row_bytes: int, device_bytes: int) -> int:
    """Pages of an index that takes at most row_bytes of host memory for rows and device_bytes of the device
    for all else."""
    spec = codec.spec
    rows_of_page = SEGMENT_TOKENS * spec.num_layers * spec.num_kv_heads * _row_parts(codec)[0]
    return min(row_bytes // rows_of_page, device_bytes // (SEGMENT_TOKENS * _device_bytes(codec)))
