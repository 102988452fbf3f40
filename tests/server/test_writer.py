"""What is encoded reaches the tiers, and what must not be used does not."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from tiny_models import DEVICE
from torch import Tensor

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.keys import PromptKeys, chain_keys, make_namespace
from aquifer.cachestore.store import TieredStore
from aquifer.compression.raw import RawCodec
from aquifer.compression.spec import Encoded, KVSpec
from aquifer.compression.wire import verify
from aquifer.server.engine.records import slot_bytes
from aquifer.server.engine.runner import LayerKV
from aquifer.server.engine.writer import SegmentWriter, WriteJob, split_segments
from aquifer.server.metrics import Metrics

SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=16, dtype=torch.float32, rope="{}")
TOKENS = 3 * 256


class MarkingCodec(RawCodec):
    """Marks values that are not finite and goes on, as a device does."""

    def encode_unchecked(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Encoded:
        rows = torch.cat((keys, values), dim=2).isfinite().all(dim=2).all(dim=0)
        return Encoded(self.encode(keys, values, counts), (~rows).int())


@pytest.fixture
def store() -> Iterator[TieredStore]:
    raw = RawCodec(SPEC)
    store = TieredStore(RamArena(8 * slot_bytes(raw, raw), slot_bytes(raw, raw)), None, verify)
    yield store
    store.close()


@pytest.fixture
def writer(store: TieredStore) -> SegmentWriter:
    return SegmentWriter(MarkingCodec(SPEC), RawCodec(SPEC), store, Metrics(), torch.device("cpu"))


@pytest.fixture
def keys() -> PromptKeys:
    return chain_keys(make_namespace("model", "codec", ""), range(TOKENS))


def jobs_of(keys: PromptKeys, values: Tensor) -> list[WriteJob]:
    """Sinks and three segments."""
    wanted = list(enumerate(keys.segments))
    return split_segments(LayerKV(torch.zeros_like(values), values), 0, wanted, keys.sinks)


def test_records_reach_the_store_and_are_reported(
    writer: SegmentWriter, store: TieredStore, keys: PromptKeys
) -> None:
    reported: list[str] = []
    writer.add(jobs_of(keys, torch.zeros(2, TOKENS, 16)), lambda: reported.append("done"))
    assert writer.backlog == 4
    writer.pump(3)
    assert writer.backlog == 1 and len(reported) == 3
    writer.close()
    assert writer.backlog == 0 and len(reported) == 4
    assert store.contains(keys.records) == ["ram"] * 4


def test_a_segment_that_is_not_finite_is_reported_but_not_stored(
    writer: SegmentWriter, store: TieredStore, keys: PromptKeys
) -> None:
    values = torch.zeros(2, TOKENS, 16)
    values[1, 300, 5] = torch.nan
    reported: list[str] = []
    writer.add(jobs_of(keys, values), lambda: reported.append("done"))
    writer.pump(8)
    assert len(reported) == 4 and writer.backlog == 0
    assert store.contains(keys.segments) == ["ram", None, "ram"]
    assert store.contains([keys.records[0]]) == ["ram"]


def test_what_cannot_be_encoded_is_reported_and_leaves_the_rest_alone(
    writer: SegmentWriter, store: TieredStore, keys: PromptKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(codec: RawCodec, keys: Tensor, values: Tensor, counts: Sequence[int]) -> Encoded:
        raise torch.OutOfMemoryError("no room")

    reported: list[str] = []
    with monkeypatch.context() as broken:
        broken.setattr(MarkingCodec, "encode_unchecked", fail)
        writer.add(jobs_of(keys, torch.zeros(2, TOKENS, 16)), lambda: reported.append("done"))
        writer.pump(3)
    writer.pump(1)
    assert len(reported) == 4 and writer.backlog == 0
    assert store.contains(keys.segments) == [None, None, "ram"]


def test_a_segment_that_is_not_finite_cannot_be_read_back(writer: SegmentWriter, keys: PromptKeys) -> None:
    values = torch.zeros(2, TOKENS, 16)
    values[0, 600, 0] = torch.inf
    jobs = jobs_of(keys, values)
    leases = writer.store_now(jobs[:3], keep=True)
    assert [record.lease.tier for record in leases] == ["ram"] * 3
    with pytest.raises(ValueError, match="segment from token 512 holds values that are not finite"):
        writer.store_now(jobs[3:], keep=False)
    for record in leases:
        record.lease.release()


def test_what_goes_before_a_segment_that_cannot_be_read_back_stays_leased_by_nobody(
    writer: SegmentWriter, store: TieredStore, keys: PromptKeys
) -> None:
    values = torch.zeros(2, TOKENS, 16)
    values[0, 100, 0] = torch.inf  # behind the sinks
    with pytest.raises(ValueError, match="segment from token 4 holds values"):
        writer.store_now(jobs_of(keys, values)[:2], keep=True)
    assert store.contains([keys.records[0]]) == ["ram"] and store.ram.open_leases == 0


def test_what_is_forgotten_is_reported_and_not_stored(
    writer: SegmentWriter, store: TieredStore, keys: PromptKeys
) -> None:
    reported: list[str] = []
    writer.add(jobs_of(keys, torch.zeros(2, TOKENS, 16)), lambda: reported.append("done"))
    assert writer.forget(set(keys.segments[1:])) == []
    assert len(reported) == 2 and writer.backlog == 2
    writer.close()
    assert len(reported) == 4
    assert store.contains(keys.segments) == ["ram", None, None]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="batches are collected for a device only")
def test_a_batch_starts_when_it_is_full_or_no_longer_grows(store: TieredStore, keys: PromptKeys) -> None:
    writer = SegmentWriter(MarkingCodec(SPEC), RawCodec(SPEC), store, Metrics(), DEVICE)
    jobs = jobs_of(keys, torch.zeros(2, TOKENS, 16, device=DEVICE))

    def stored_after(limit: int) -> list[str | None]:
        writer.pump(limit)
        for _ in range(2):  # sinks and segments are batches of their own
            writer.wait(5)
            writer.pump(0)
        return store.contains(keys.records)

    writer.add(jobs, lambda: None)
    assert stored_after(5) == [None] * 4
    assert stored_after(5) == ["ram"] * 4
    store.delete(keys.records)
    writer.add(jobs, lambda: None)
    assert stored_after(4) == ["ram"] * 4
    writer.close()
