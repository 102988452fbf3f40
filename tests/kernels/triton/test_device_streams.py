"""Stored segments as streams of layers over queues of a device, and restores that are recorded from them."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from fused_codecs import COUNTS, DTYPE, NAMES, SPEC, codec_pair, kv, layers_of
from no_queues import NoQueues
from torch import Tensor

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.keys import chain_keys, make_namespace
from aquifer.cachestore.tier import Lease, copy_of
from aquifer.compression.fused import FusedAquaCodec
from aquifer.compression.raw import RawCodec
from aquifer.compression.wire import RecordHeader, RecordOpener, sealed
from aquifer.kernels.attention import attend_ref, merge_attention
from aquifer.kernels.rope import apply_rope
from aquifer.server.engine import device_streams
from aquifer.server.engine.device_streams import ChainedSegments, LandedLayers, Landing, Sinks
from aquifer.server.engine.fetch import StoredRecord, StoredSegment
from aquifer.server.engine.host_slices import HostRecords, HostSlices
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.streams import SegmentReader
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter

if TYPE_CHECKING:
    from aquifer.server.engine.recorded_restore import RecordedRestores, Recording

UNTOUCHED = 7.0


@pytest.fixture(autouse=True)
def queues(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Without a device everything happens at once."""
    if device.type == "cpu":
        monkeypatch.setattr(device_streams, "queues_of", lambda device: NoQueues())


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a codec."""
    return request.param


def own_record(body: Tensor) -> StoredRecord:
    """A record that lies elsewhere than in an arena."""
    view = memoryview(body.numpy())
    return StoredRecord(Lease(view, "own"), view)


class Stored:
    """Segments and sinks in host memory, and what they are worth."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.codec, _ = codec_pair(name, device)
        self.raw = RawCodec(SPEC)
        keys, values = kv(4 + sum(COUNTS), device)
        segments = self.codec.encode(keys[:, 4:].contiguous(), values[:, 4:].contiguous(), COUNTS)
        (sinks,) = self.raw.encode(keys[:, :4], values[:, :4], [4])
        self.bodies = [segment.cpu() for segment in segments]
        self.sinks = self.raw.rows(sinks.cpu())
        angles = torch.randn(4 + sum(COUNTS), 64, generator=torch.Generator().manual_seed(1)).to(device)
        self.rope = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        self.pre_rope = torch.cat(
            (torch.stack((keys[:, :4], values[:, :4]), dim=1), layers_of(self.codec, segments, COUNTS)), dim=2
        )

    def rope_table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope
        return cos[positions], sin[positions]

    def segments(self, first: int = 0, count: int = len(COUNTS)) -> ChainedSegments:
        """So many, from token `first` on, which is that of the sinks or the one behind them."""
        sinks = None if first else Sinks(self.sinks, self.rope_table(torch.arange(4)))
        spans = [(4 + sum(COUNTS[:i]), COUNTS[i]) for i in range(count)]
        records = [own_record(body) for body in self.bodies[:count]]
        return ChainedSegments(self.codec, records, spans, self.rope_table, sinks, self.rope[0].device)

    def expected(self, first: int) -> Tensor:
        """Keys after RoPE and values [L, 2, H, T, D] from token `first` on."""
        rows = self.pre_rope[:, :, first:].unflatten(3, (2, 64)).float()
        cos, sin = (table[first:].float() for table in self.rope)
        keys = torch.stack([apply_rope(layer, cos, sin) for layer in rows[:, 0]])
        return torch.stack((keys, rows[:, 1]), dim=1).transpose(2, 3)


@pytest.fixture
def stored(name: str, device: torch.device) -> Iterator[Stored]:
    return Stored(name, device)


def recording_of(recorded: RecordedRestores, segments: ChainedSegments) -> Recording:
    found = recorded.of(segments)
    assert found is not None
    return found


def close(found: Tensor, expected: Tensor) -> None:
    # Decoding to compare with rounds before RoPE as well.
    torch.testing.assert_close(found.float(), expected, atol=0.06, rtol=0.02)


def test_a_stream_gives_layer_after_layer(stored: Stored, launched: list[str]) -> None:
    segments = stored.segments()
    assert segments.num_tokens == 4 + sum(COUNTS)
    for _ in range(2):
        stream = segments.open()
        for expected in stored.expected(0):
            close(torch.stack(stream.next_layer()), expected)


def test_staging_is_what_a_stream_takes_of_the_device(stored: Stored, device: torch.device) -> None:
    segments = stored.segments()
    queues = device_streams.queues_of(device)
    landing, decoder = Landing(segments.slices, queues.copies), segments.decoder()
    stream = landing.memory.nbytes + sum(tensor.nbytes for tensor in decoder.buffers)
    assert segments.staging_bytes(1, query_heads=6) == stream + 4 * 6 * sum(COUNTS)
    assert segments.staging_bytes(2, query_heads=6) == stream + segments.new_layer().nbytes


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_to_a_stream_is_attention_to_its_layers(
    queries: int, stored: Stored, device: torch.device, launched: list[str]
) -> None:
    """One query reads the state, several read keys and values that are written for them."""
    segments = stored.segments()
    stream = segments.open()
    for expected in stored.expected(0):
        q = torch.randn(2 * SPEC.num_kv_heads, queries, SPEC.head_dim, device=device).to(DTYPE)
        close(merge_attention(stream.attend(q)), attend_ref(q.float(), *expected)[0])
    assert ("_score_keys" in launched) == (queries == 1)
    assert ("_emit" in launched) == (queries > 1)


def test_segments_without_sinks_are_restored_into_pages(
    stored: Stored, device: torch.device, launched: list[str]
) -> None:
    segments = stored.segments(first=4)
    pool = PagePool(SPEC, 2 * SPEC.bytes_per_token * 256, device, keep=False)
    pool.keys.fill_(7), pool.values.fill_(7)
    total = sum(COUNTS)
    segments.open().restore(pool, [(300, 304), (20, 16 + total)])
    pages = torch.stack((pool.keys, pool.values), dim=1)
    expected = stored.expected(4)
    close(pages[:, :, :, 300:304], expected[:, :, :, :4])
    close(pages[:, :, :, 20 : 16 + total], expected[:, :, :, 4:])
    assert (pages[:, :, :, :20] == 7).all() and (pages[:, :, :, 16 + total : 300] == 7).all()


def test_sinks_are_restored_as_they_were(stored: Stored, device: torch.device, launched: list[str]) -> None:
    segments = stored.segments()
    pool = PagePool(SPEC, SPEC.bytes_per_token * 256, device, keep=False)
    segments.open().restore(pool, [(100, 104 + sum(COUNTS))])
    pages = torch.stack((pool.keys, pool.values), dim=1)
    close(pages[:, :, :, 100 : 104 + sum(COUNTS)], stored.expected(0))
    assert torch.equal(pages[:, 1, :, 100:104], stored.expected(0)[:, 1, :, :4].to(DTYPE))


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[], bool]:
    """Whether a restore is being recorded. Without a device what was recorded runs again where it would be
    replayed, and while it is recorded nothing may come from the host."""
    from aquifer.server.engine import recorded_restore

    now = False

    def offsets(codec: FusedAquaCodec, *which: Any) -> Tensor:
        if now:
            raise RuntimeError("operation not permitted when stream is capturing")
        return compute_offsets(codec, *which)

    def record_graph(launch: Callable[[], None], *_: object) -> tuple[SimpleNamespace, int]:
        nonlocal now
        launch()
        now = True
        launch()
        now = False
        return SimpleNamespace(replay=launch), 1

    compute_offsets = FusedAquaCodec._decode_offsets
    monkeypatch.setattr(recorded_restore, "SEGMENT_TOKENS", max(COUNTS))
    if device.type == "cpu":
        monkeypatch.setattr(FusedAquaCodec, "_decode_offsets", offsets)
        monkeypatch.setattr(recorded_restore, "record_graph", record_graph)
        monkeypatch.setattr(recorded_restore, "Queues", lambda *_: NoQueues())
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return lambda: now


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # in rows of missing segments
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("first", [0, 4])
def test_a_recorded_restore_is_a_launched_one(
    first: int,
    parts: int,
    stored: Stored,
    device: torch.device,
    launched: list[str],
    recording: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, of as many segments as were recorded and of fewer, and into other pages."""
    from aquifer.server.engine import recorded_restore
    from aquifer.server.engine.recorded_restore import RecordedRestores

    monkeypatch.setattr(recorded_restore, "FEWEST", 2 // parts)
    pool = PagePool(SPEC, 3 * SPEC.bytes_per_token * 256, device, keep=False)
    recorded = RecordedRestores(stored.codec, pool, stored.rope_table, 2)
    for number, count in enumerate((1, 2, 1)):
        if number == 2:  # other bytes at other addresses
            keys, values = kv(4 + sum(COUNTS), device)
            halves = -keys[:, 4:].contiguous(), values[:, 4:].flip(1).contiguous()
            stored.bodies = [segment.cpu() for segment in stored.codec.encode(*halves, COUNTS)]
        pool.keys.fill_(UNTOUCHED), pool.values.fill_(UNTOUCHED)
        stored.segments(first, count).open().restore(pool, [(first, 4 + sum(COUNTS[:count]))])
        page = 1 + number % 2
        segments = stored.segments(first, count)
        recording_of(recorded, segments).replay(segments, BlockTable([page]))
        pages = torch.stack((pool.keys, pool.values), dim=1).unflatten(3, (3, 256))
        assert (pages[:, :, :, 0, first : 4 + sum(COUNTS[:count])] != UNTOUCHED).any(dim=4).all()
        assert torch.equal(pages[:, :, :, page], pages[:, :, :, 0])
        assert (pages[:, :, :, 3 - page] == UNTOUCHED).all()
    assert recorded.device_bytes > 0
    too_many = cast(ChainedSegments, SimpleNamespace(counts=(4,) * 3))
    assert recorded.of(too_many) is None


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # in rows of missing segments
def test_sinks_are_written_beside_a_recorded_restore(
    stored: Stored, device: torch.device, recording: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind all that was asked of the device before, and ahead of all that is asked afterwards."""
    from aquifer.server.engine import recorded_restore

    if device.type == "cuda":
        pytest.skip("a device's queues keep no log")
    made: list[NoQueues] = []
    monkeypatch.setattr(recorded_restore, "Queues", lambda *_: made.append(NoQueues()) or made[-1])
    pool = PagePool(SPEC, SPEC.bytes_per_token * 256, device, keep=False)
    recorded = recorded_restore.RecordedRestores(stored.codec, pool, stored.rope_table, 2)
    without, whole = stored.segments(4, 2), stored.segments(0, 2)
    recording_of(recorded, without).replay(without, BlockTable([0]))
    assert not made[0].sinks.log  # there are none
    asked, recorded_whole = len(made[0].called), recording_of(recorded, whole)
    # Angles are multiplied for, and cuBLAS keeps working memory for each queue that does.
    monkeypatch.setattr(whole, "_rope_table", None)
    recorded_whole.replay(whole, BlockTable([0]))
    assert made[0].sinks.log == [made[0].called[asked], "work"]
    assert made[0].awaited[-1] is made[0].sinks.marked


def test_a_record_in_the_arena_is_read_where_it_lies(device: torch.device) -> None:
    """And copied from anywhere else."""
    arena = RamArena(4 * 1024, 1024)
    (key,) = chain_keys(make_namespace("model", "codec", ""), range(8), segment_tokens=8).segments
    body = bytes(range(200))
    lease, _ = arena.insert(key, *copy_of(sealed(RecordHeader("segment", "codec", key.digest, 0, 8), body)))
    assert lease is not None
    opener = RecordOpener("segment", "codec", 0, 8, len(body))
    within = StoredRecord(lease, opener.open(lease.data, key.digest))
    elsewhere = own_record(torch.arange(100, dtype=torch.uint8))
    records = HostRecords([elsewhere, within, elsewhere], device)
    assert records.addresses[1] == within.address
    assert ctypes.string_at(records.addresses[1], len(body)) == body
    copied_from = torch.frombuffer(elsewhere.body, dtype=torch.uint8).data_ptr()
    for address in records.addresses[::2]:
        assert ctypes.string_at(address, 100) == bytes(range(100)) and address != copied_from


def test_groups_are_recorded_for_a_few_numbers_of_segments(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, recording: Callable[[], bool]
) -> None:
    """The largest first; and what could not be recorded is launched, but nothing else is."""
    from aquifer.server.engine import recorded_restore

    made: list[int] = []

    def make(codec: object, counts: tuple[int, ...], *_: object) -> SimpleNamespace:
        made.append(len(counts))
        if len(counts) == 48:
            raise torch.OutOfMemoryError("no room")
        return SimpleNamespace(device_bytes=len(counts))

    monkeypatch.setattr(recorded_restore, "Recording", make)
    pool = PagePool(SPEC, SPEC.bytes_per_token * 256, device, keep=False)
    codec, _ = codec_pair("higgs:3", device)
    recorded = recorded_restore.RecordedRestores(codec, pool, lambda positions: (positions,) * 2, 100)

    def restored(count: int) -> bool:
        return recorded.of(cast(ChainedSegments, SimpleNamespace(counts=(4,) * count))) is not None

    assert [count for count in (1, 8, 9, 33, 40, 65, 99) if not restored(count)] == [33, 40]
    assert made == [100, 8, 16, 48, 80]
    assert recorded.device_bytes == 100 + 8 + 16 + 80


def test_a_source_goes_with_its_last_user(device: torch.device) -> None:
    """And with it the device's memory and page-locked memory that it holds."""
    codec, _ = codec_pair("aqua:2", device)
    angles = torch.zeros(256, SPEC.head_dim, dtype=DTYPE, device=device)
    adapter = cast(
        DecoderAdapter,
        SimpleNamespace(
            spec=SPEC,
            device=device,
            num_q_heads=4,
            rope_table=lambda positions: (angles[positions],) * 2,
        ),
    )
    raw = RawCodec(SPEC)
    rows, sinks = (
        own_record(torch.zeros(size, dtype=torch.uint8))
        for size in (codec.segment_bytes(252), raw.segment_bytes(4))
    )
    source = SegmentReader(adapter, codec, raw, Metrics()).source([StoredSegment(0, rows, sinks)])
    assert source.chained is not None and source.chained.rope[0].shape == (252, SPEC.head_dim)
    known = weakref.ref(source)
    gc.disable()
    try:
        del source
        assert known() is None
    finally:
        gc.enable()


def test_layers_of_any_codec_land_in_order(device: torch.device, launched: list[str]) -> None:
    raw = RawCodec(SPEC)
    keys, values = kv(40, device)
    bodies = [segment.cpu() for segment in raw.encode(keys, values, [24, 16])]
    sizes = [[raw.layer_bytes(layer, n) for n in (24, 16)] for layer in range(SPEC.num_layers)]
    records = HostRecords([own_record(body) for body in bodies], device)
    slices = HostSlices(raw, [24, 16], records.on_device())
    next_layer = LandedLayers(slices, raw.decoder([24, 16], device), sizes)
    for expected in zip(keys, values, strict=True):
        assert torch.equal(torch.stack(next_layer()), torch.stack(expected))
