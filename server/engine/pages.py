"""The device's KV cache, in pages of one segment each.

One tensor of keys (after RoPE) and one of values hold every page. A page that carries a finished
segment of a prompt is registered under its SegmentKey and shared by every request whose prompt
starts the same way; that is the `gpu` tier. Pages nobody uses stay registered until their room is
needed, least recently used first. The unfinished tail of a prompt and the generated tokens live in
pages private to their request.

Only the engine's thread touches a pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aquifer.cachestore.keys import SegmentKey
from aquifer.compression.spec import SEGMENT_TOKENS, KVSpec


class PageAllocator:
    """Which pages are free, used and by how many, or kept for whoever asks for the same segment.

    Knows nothing of what lies in them: the device's KV and the landmarks of selective decoding both
    keep books this way.
    """

    def __init__(self, num_pages: int, *, keep: bool) -> None:
        """keep: whether pages nobody uses stay registered."""
        self.num_pages = num_pages
        self._keep = keep
        # Of page number 0 at place 1: neither end is ever free, so that every run of free ones has two.
        self._is_free = np.pad(np.ones(num_pages, dtype=bool), 1)
        self._num_free = num_pages
        self._users = [0] * num_pages
        self._key_of: dict[int, SegmentKey] = {}
        self._page_of: dict[SegmentKey, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, no user; oldest first

    @property
    def used_pages(self) -> int:
        """Pages that hold something, shared or private."""
        return self.num_pages - self._num_free

    @property
    def available_pages(self) -> int:
        """Pages that `allocate` could hand out now."""
        return self._num_free + len(self._idle)

    def acquire(self, key: SegmentKey) -> int | None:
        """Use the page registered under key, or None. Give it back with `release`."""
        page = self._page_of.get(key)
        if page is not None:
            self._users[page] += 1
            self._idle.pop(page, None)
        return page

    def holds(self, key: SegmentKey) -> bool:
        return key in self._page_of

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` private pages, in ascending runs where possible; None if there are too few.

        Idle pages are taken from the cache, oldest first, only as far as free ones do not suffice.
        """
        if count > self.available_pages:
            return None
        while self._num_free < count:
            self._set_free(self._unregister(next(iter(self._idle))))
        pages = _longest_runs_first(self._is_free, count)
        for page in pages:
            self._is_free[page + 1] = False
            self._users[page] = 1
        self._num_free -= count
        return pages

    def register(self, page: int, key: SegmentKey) -> None:
        """Share a page that now holds the finished segment `key`. The first page of a key stays."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Iterable[int]) -> None:
        """Stop using pages. Pass a prompt's pages in order: its suffix is then evicted first."""
        for page in reversed(list(pages)):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of and self._keep:
                self._idle[page] = None
            else:
                self._set_free(self._unregister(page))

    def forget(self, keys: Iterable[SegmentKey]) -> None:
        """Stop sharing these segments; idle pages are freed, used ones when their users are done."""
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                continue
            idle = page in self._idle
            self._unregister(page)
            if idle:
                self._set_free(page)

    def drop_idle(self) -> None:
        """Empty the cache of pages nobody uses."""
        while self._idle:
            self._set_free(self._unregister(next(iter(self._idle))))

    def _set_free(self, page: int) -> None:
        self._is_free[page + 1] = True
        self._num_free += 1

    def _unregister(self, page: int) -> int:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
        self._idle.pop(page, None)
        return page


class PagePool(PageAllocator):
    """Paged keys and values of all layers.

    keys, values: [L, H, P*256, D] in the model's dtype. Head-major, so that pages next to each other
    are one strided [H, S, D] view that attention reads without a gather.
    """

    def __init__(self, spec: KVSpec, capacity_bytes: int, device: torch.device, *, keep: bool) -> None:
        """keep: whether pages nobody uses stay registered. Raises ValueError if not one page fits."""
        self.page_bytes = spec.bytes_per_token * SEGMENT_TOKENS
        super().__init__(capacity_bytes // self.page_bytes, keep=keep)
        if self.num_pages < 1:
            raise ValueError(
                f"{capacity_bytes:,} bytes of device KV hold no page; one takes {self.page_bytes:,} "
                "(AQUIFER_GPU_KV_BYTES)"
            )
        shape = (spec.num_layers, spec.num_kv_heads, self.num_pages * SEGMENT_TOKENS, spec.head_dim)
        self.keys = torch.empty(shape, dtype=spec.dtype, device=device)
        self.values = torch.empty(shape, dtype=spec.dtype, device=device)

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that hold something, shared or private."""
        return self.used_pages * self.page_bytes

    def cells(self, layer: int, nbytes: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of one layer as plain memory in cells of so many bytes, which divide a
        slot's: uint8 [H, cells, nbytes] each."""
        keys, values = (half[layer].view(torch.uint8) for half in (self.keys, self.values))
        return keys.view(len(keys), -1, nbytes), values.view(len(values), -1, nbytes)

    def write(self, layer: int, runs: Sequence[tuple[int, int]], k: Tensor, v: Tensor) -> None:
        """Put keys (after RoPE) and values of one layer into the slots of `runs`.

        k, v: [H, T, D], any float dtype, T = total length of the runs.
        """
        done = 0
        for first, last in runs:
            self.keys[layer, :, first:last] = k[:, done : done + last - first]
            self.values[layer, :, first:last] = v[:, done : done + last - first]
            done += last - first


class BlockTable:
    """The pages of one sequence in order, and where its tokens lie in the pool.

    None stands for a segment that is not on the device; its tokens have no slots.
    """

    def __init__(self, pages: Sequence[int | None]) -> None:
        self.pages = list(pages)

    @property
    def held(self) -> list[int]:
        """The pages that are there, in order."""
        return [page for page in self.pages if page is not None]

    def runs(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Slot ranges (first, last + 1) of spans of tokens (start, count), neighbours joined.

        Tokens without a slot are left out.
        """
        runs: list[tuple[int, int]] = []
        for start, count in spans:
            stop = start + count
            while start < stop:
                step = min(SEGMENT_TOKENS - start % SEGMENT_TOKENS, stop - start)
                slot = self.slot(start)
                if slot is not None:
                    if runs and runs[-1][1] == slot:
                        runs[-1] = (runs[-1][0], slot + step)
                    else:
                        runs.append((slot, slot + step))
                start += step
        return runs

    def slot(self, position: int) -> int | None:
        """Slot of one token; None if its segment is not on the device."""
        index, offset = divmod(position, SEGMENT_TOKENS)
        page = self.pages[index]
        return None if page is None else page * SEGMENT_TOKENS + offset


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // SEGMENT_TOKENS)


def _longest_runs_first(is_free: NDArray[np.bool_], count: int) -> list[int]:
    """Choose `count` pages, of which at least so many are free, in as few ascending runs as is easily found.

    The shortest run that holds them all is taken, else the longest run and then the rest: a large
    document keeps few, long pieces, and small requests do not cut up large gaps.

    is_free: as in PageAllocator.
    """
    edges = np.flatnonzero(is_free[1:] != is_free[:-1])
    firsts, lasts = edges[0::2], edges[1::2]
    sizes = lasts - firsts
    chosen: list[int] = []
    while len(chosen) < count:
        missing = count - len(chosen)
        fitting = np.flatnonzero(sizes >= missing)
        run = fitting[sizes[fitting].argmin()] if len(fitting) else sizes.argmax()
        chosen += range(firsts[run], firsts[run] + min(missing, sizes[run]))
        sizes[run] = 0
    return chosen
