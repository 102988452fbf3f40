"""Every kernel compiles for Hopper as its launcher calls it, at the geometry of Llama-3.1-8B, without spills.

The compiler needs no device. It finds what the interpreter lets through: types, shapes of products, shared
memory, registers.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from tiny_models import FAMILIES, SHAPE
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelInterface

from aquifer.benchmarks.selection_cuda import imposed_on_lanes
from aquifer.compression.aqua import load_quantizer
from aquifer.compression.fused import FusedAquaCodec
from aquifer.compression.predictors import LayerFit, PredictorCard, Predictors
from aquifer.compression.spec import SINK_TOKENS, KVSpec
from aquifer.kernels.backend import triton_backend
from aquifer.kernels.triton.attention import attend_pages, merge_parts
from aquifer.kernels.triton.cells import find_rows
from aquifer.kernels.triton.emit import emit
from aquifer.kernels.triton.gather import gather_slices
from aquifer.kernels.triton.higgs import higgs_encode
from aquifer.kernels.triton.landmarks import score_landmarks
from aquifer.kernels.triton.lanes import NOBODY
from aquifer.kernels.triton.norms import add_rms_norm, rms_norm, swiglu
from aquifer.kernels.triton.rope import rotate_and_store
from aquifer.kernels.triton.row_attention import attend_rows
from aquifer.kernels.triton.rows import fetch_rows, load_rows
from aquifer.kernels.triton.select import select_tokens
from aquifer.kernels.triton.state_attention import attend_state
from aquifer.server.engine import lanes as engine_lanes
from aquifer.server.engine.graphs import GraphedStep, PagedLanes
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.runner import ModelRunner, PagedCache, Rows
from aquifer.server.models.adapter import DecoderAdapter

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 232_448  # of one block on an H100 or H200
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

HEADS, GROUP, HEAD_DIM, PAGES = 8, 4, 128, 16
SLOTS = PAGES * 256
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class _NoDevice:
    """A driver that knows for what to compile and can run nothing."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled(list[str]):
    """Names of the kernels that compiled and fit."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self.spills_bytes = 0
        """Per thread, that may be spilled."""

    def add(self, kernel: JITFunction, *args: object, **kwargs: object) -> None:
        binary = kernel.run(*args, grid=(1,), warmup=True, **kwargs)
        assert binary.metadata.shared <= SHARED_MEMORY_BYTES
        path = self._folder / f"{kernel.__name__}.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        stack = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert stack and int(stack[2]) <= self.spills_bytes, f"{kernel.__name__} spills registers: {usage}"
        self.append(kernel.__name__)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Compiled:
    """Launches compile instead of running."""
    names = _Compiled(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "_active", _NoDevice())
    monkeypatch.setattr(
        KernelInterface,
        "__getitem__",
        lambda kernel, grid: lambda *args, **kwargs: names.add(kernel, *args, **kwargs),
    )
    return names


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("shared", "head_dim", "group", "dtype"),
    [
        (False, 64, 7, torch.float32),
        (True, 64, 1, torch.float16),
        (False, 128, 4, torch.bfloat16),
        (True, 128, 8, torch.bfloat16),
    ],
)
def test_a_layer_of_selective_decoding_compiles(
    shared: bool, head_dim: int, group: int, dtype: torch.dtype, compiled: _Compiled
) -> None:
    """As the engine launches it."""
    requests, sets, first = 2, (1 if shared else HEADS), SINK_TOKENS
    lanes = torch.zeros(requests, len(NOBODY), dtype=torch.int64)
    q = torch.zeros(requests, HEADS * group, head_dim, dtype=dtype)
    pool, signs = torch.zeros(HEADS, SLOTS, head_dim, dtype=dtype), torch.ones(head_dim)
    codes = torch.zeros(SLOTS, HEADS * head_dim // 4, dtype=torch.uint8)
    scales = torch.zeros(SLOTS, HEADS, dtype=torch.float16)
    rows = torch.zeros(SLOTS, HEADS * head_dim, dtype=torch.uint8)
    row_scales = torch.zeros(SLOTS, HEADS * 4, dtype=torch.uint8)
    partial_lse = score_landmarks(q, signs, codes, scales, torch.zeros(256, 4), lanes, first=first)
    select_tokens(lanes, partial_lse, sets, first=first)
    for layer in (0, 1, 16):
        counters, per_slot = torch.zeros(2, dtype=torch.int64), 2 * dtype.itemsize
        missing = find_rows(lanes, layer, sets, counters, sinks=first, per_slot=per_slot)
    fetch_rows(lanes, missing, rows, pool, pool)
    load_rows(int32(2), int32(2).long(), int32(1), rows, pool, pool, sinks=first)
    decoding = row_scales, torch.zeros(256, 2), signs, torch.zeros(HEADS, head_dim)
    attend_rows(q, pool, pool, *decoding, lanes, sets=sets, sinks=first)
    assert list(dict.fromkeys(compiled)) == [
        *("_prepare", "score_pages", "_rank", "_collect", "_decide"),
        *("_find", "_fetch_rows", "_load_rows", "_attend_rows", "_join_rows"),
    ]


def test_scoring_landmarks_of_wide_heads_compiles(compiled: _Compiled) -> None:
    codes, scales = torch.zeros(256, 256, dtype=torch.uint8), torch.zeros(256, 4, dtype=torch.float16)
    lanes, q = torch.zeros(1, len(NOBODY), dtype=torch.int64), torch.zeros(1, 8, 256)
    score_landmarks(q, torch.ones(256), codes, scales, torch.zeros(256, 4), lanes)
    assert compiled == ["_prepare", "score_pages"]


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_attention_compiles(head_dim: int, dtype: torch.dtype, queries: int, compiled: _Compiled) -> None:
    pool = torch.zeros(HEADS, SLOTS, head_dim, dtype=dtype)
    q = torch.zeros(2 * queries, HEADS * GROUP, head_dim, dtype=dtype)
    attend_pages(q, pool, pool, int32(2, SLOTS // 256), int32(2 * queries))
    assert compiled == ["_attend_split", "_merge_splits"]


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16), (256, torch.float32)]
)
def test_merging_attention_compiles(head_dim: int, dtype: torch.dtype, compiled: _Compiled) -> None:
    """Of one row and of many, in the layouts that attention over pieces has."""
    for count, rows in ((2, 1), (2, 512), (8, 512)):
        by_token = torch.zeros(rows, HEADS * GROUP, head_dim, dtype=dtype).transpose(0, 1)
        by_head = by_token.contiguous()
        lse = torch.zeros(HEADS * GROUP, rows)
        merge_parts([(by_token, lse), (by_head, torch.zeros(HEADS * GROUP, 544)[:, :rows])] * (count // 2))
    assert compiled == 3 * ["_merge_parts"]


@pytest.mark.parametrize(
    ("family", "head_dim", "dtype"),
    [
        ("llama", 128, torch.bfloat16),
        ("llama", 16, torch.float32),
        ("qwen2", 64, torch.float16),
        ("qwen3", 128, torch.bfloat16),
        ("qwen3", 128, torch.float32),
    ],
)
def test_what_a_step_and_a_chunk_launch_compiles(
    family: str, head_dim: int, dtype: torch.dtype, compiled: _Compiled
) -> None:
    """As the engine launches it: one row and many, a few tokens and a chunk."""
    config_class, model_class, extra = FAMILIES[family]
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": head_dim, "num_hidden_layers": 1}
    model = model_class(config_class(**{**SHAPE, **extra, **sizes})).to(dtype)
    adapter = DecoderAdapter(model, max_tokens=4096, backend=triton_backend())
    pool = PagePool(adapter.spec, 4 * 256 * adapter.spec.bytes_per_token, torch.device("cpu"), keep=False)
    step = GraphedStep(adapter, pool, PagedLanes(pool, adapter.backend, 8, 4), 8, memory=None)
    runner = ModelRunner(adapter, pool, [step])
    cache = PagedCache(pool, BlockTable([2, 0, 1]))
    for count in (1, 3, 300):
        runner.prefill([7] * count, 0, cache)
    for count in (1, 2, 5):
        runner.step([Rows([7], 300, cache)] * count)
    layers = {"_rms_norm", "_swiglu", "_rotate_store", "_attend_split", "_merge_splits"}
    assert layers | {"_find_best", "_join_best"} == set(compiled)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_encoding_compiles(bits: int, compiled: _Compiled) -> None:
    quantizer = load_quantizer(bits, torch.device("cpu"))
    for group in (64, HEAD_DIM):
        higgs_encode(torch.zeros(32, HEADS * HEAD_DIM), quantizer, group)
    assert compiled == ["_encode", "_encode"]


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "tokens"),
    [
        (HEADS, HEAD_DIM, torch.bfloat16, 256),
        (HEADS, HEAD_DIM, torch.bfloat16, 1),
        (HEADS, HEAD_DIM, torch.float32, 252),
        (2, 64, torch.bfloat16, 252),
        (5, 128, torch.float16, 256),
    ],
)
def test_emitting_compiles(
    heads: int, head_dim: int, dtype: torch.dtype, tokens: int, compiled: _Compiled
) -> None:
    channels = heads * head_dim
    pool = torch.zeros(2, heads, SLOTS, head_dim, dtype=dtype)
    state = torch.zeros(tokens, 3 * channels, dtype=torch.bfloat16)[:, channels:]
    angles, slots = torch.zeros(tokens, head_dim, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    emit(state, torch.ones(channels), channels & -channels, (angles, angles), slots, *pool)
    assert compiled == ["_emit"]


@pytest.mark.parametrize(
    ("heads", "head_dim", "group", "dtype", "tokens"),
    [
        (HEADS, HEAD_DIM, 4, torch.bfloat16, 131_072),
        (HEADS, HEAD_DIM, 4, torch.bfloat16, 1),
        (HEADS, HEAD_DIM, 4, torch.float32, 252),
        (2, 64, 7, torch.bfloat16, 252),
        (5, 128, 1, torch.float16, 256),
    ],
)
def test_attention_to_a_state_compiles(
    heads: int, head_dim: int, group: int, dtype: torch.dtype, tokens: int, compiled: _Compiled
) -> None:
    channels = heads * head_dim
    state = torch.zeros(1, 3 * channels, dtype=dtype)[:, channels:].expand(tokens, -1)
    angles, q = torch.zeros(tokens, head_dim, dtype=dtype), torch.zeros(heads * group, head_dim, dtype=dtype)
    attend_state(q, state, torch.ones(channels), channels & -channels, (angles, angles))
    assert compiled == ["_score_keys", "_sum_values", "_merge_rotated"]


@pytest.mark.parametrize(
    ("heads", "head_dim", "name", "tokens"),
    [
        (HEADS, HEAD_DIM, "aqua:2", 256),
        (HEADS, HEAD_DIM, "aqua:2", 1),
        (HEADS, HEAD_DIM, "aqua:3", 252),
        (HEADS, HEAD_DIM, "aqua:4", 252),
        (2, 64, "aqua:2", 252),
        (3, 128, "higgs:3", 256),
        (HEADS, HEAD_DIM, "aqua:2:int8", 256),
        (HEADS, HEAD_DIM, "aqua:4:int8", 1),
        (2, 64, "aqua:3:int8", 252),
    ],
)
def test_the_fused_codec_compiles(
    heads: int, head_dim: int, name: str, tokens: int, compiled: _Compiled
) -> None:
    """Everything that a codec launches, as it launches it."""
    compiled.spills_bytes = 500  # a step holds a tile and its residual, once per tile
    dtype, cpu = torch.bfloat16, torch.device("cpu")
    spec = KVSpec(num_layers=2, num_kv_heads=heads, head_dim=head_dim, dtype=dtype, rope="{}")
    channels, bits, int8 = spec.channels, int(name.split(":")[1]), name.endswith("int8")
    predictors = None
    if name.startswith("aqua"):
        zeros, weights = torch.zeros(1, channels), torch.zeros(1, 2 * channels, channels, dtype=dtype)
        fits = [LayerFit(layer, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0) for layer in range(2)]
        card = PredictorCard("none", "none", 0, 0, 0.0, bits, fits)
        predictors = Predictors(zeros[0], zeros[0], weights, zeros, weights, zeros, card)
    codec = FusedAquaCodec(spec, bits, predictors, device=cpu, codec_dtype=dtype, int8=int8)
    keys, values = torch.zeros(2, 2, tokens, channels, dtype=dtype)
    segments = codec.encode(keys, values, [tokens])
    sizes = [codec.layer_bytes(layer, tokens) for layer in range(2)]
    decoder = codec.decoder([tokens], cpu)
    for layer in segments[0].split(sizes):
        decoder.decode_layer([layer])
    assert set(compiled) == {"_encode_rows", "_decode_rows", "_emit"} | ({"_step"} if predictors else set())


def test_gathering_slices_compiles(compiled: _Compiled) -> None:
    records, table = torch.zeros(128, dtype=torch.int64), int32(128)
    gather_slices(records, table, table, table, 132_096, torch.zeros(64, dtype=torch.uint8))
    assert compiled == ["_gather"]


def test_norms_and_swiglu_compile(compiled: _Compiled) -> None:
    x, weight = torch.zeros(2, 4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    rms_norm(x, weight, 1e-5)
    add_rms_norm(x, x, weight, 1e-5)
    swiglu(x, x)
    assert compiled == ["_rms_norm", "_rms_norm", "_swiglu"]


@pytest.mark.parametrize("tokens", [4, 512])
def test_rotating_and_storing_compiles(tokens: int, compiled: _Compiled) -> None:
    pool = torch.zeros(HEADS, SLOTS, HEAD_DIM, dtype=torch.bfloat16)
    angles, slots = (
        torch.zeros(tokens, HEAD_DIM, dtype=torch.bfloat16),
        torch.zeros(tokens, dtype=torch.int32),
    )
    product = torch.zeros(tokens, (GROUP + 2) * HEADS, HEAD_DIM, dtype=torch.bfloat16)
    q, k, v = product.split([GROUP * HEADS, HEADS, HEADS], dim=1)
    rotate_and_store(q, k, v, angles, angles, slots, pool, pool)
    assert compiled == ["_rotate_store"]


def test_single_tokens_pages_and_splits_compile(compiled: _Compiled) -> None:
    """The compiler makes a constant of every argument that is 1."""
    pool, q = torch.zeros(1, 256, 64, dtype=torch.float16), torch.zeros(1, 1, 64, dtype=torch.float16)
    attend_pages(q, pool, pool, int32(1, 1), int32(1), splits=1)
    codes, scales = torch.zeros(256, 16, dtype=torch.uint8), torch.zeros(256, 1, dtype=torch.float16)
    lanes, signs = torch.zeros(1, len(NOBODY), dtype=torch.int64), torch.ones(64)
    lse = score_landmarks(q, signs, codes, scales, torch.zeros(256, 4), lanes, first=1, parts=1)
    select_tokens(lanes, lse, 1, first=1)
    find_rows(lanes, 1, 1, torch.zeros(2, dtype=torch.int64), sinks=1, per_slot=4)
    rows, row_scales = (torch.zeros(256, size, dtype=torch.uint8) for size in (64, 4))
    fetch_rows(lanes, int32(1, 1), rows, pool, pool, programs=1)
    load_rows(int32(1), int32(1).long(), int32(1), rows, pool, pool, sinks=1, programs=1)
    decoding = row_scales, torch.zeros(256, 2), signs, torch.zeros(1, 64)
    attend_rows(q, pool, pool, *decoding, lanes, sets=1, sinks=1, splits=1)
    angles = torch.zeros(1, 64)
    emit(torch.zeros(1, 128), torch.ones(64), 64, (angles, angles), int32(1), pool, pool)
    higgs_encode(torch.zeros(1, 64), load_quantizer(2, torch.device("cpu")), 64)
    assert compiled == [
        *("_attend_split", "_merge_splits", "_prepare", "score_pages", "_rank", "_collect", "_decide"),
        *("_find", "_fetch_rows", "_load_rows", "_attend_rows", "_join_rows"),
        *("_emit", "_encode"),
    ]


@pytest.mark.parametrize("layer", [0, 1, 31])
def test_what_benchmarks_put_in_between(compiled: _Compiled, layer: int) -> None:
    lanes, missed = torch.zeros(2, len(NOBODY), dtype=torch.int64), torch.zeros(2, 32, HEADS, 4096)
    with imposed_on_lanes(missed, lambda: True):
        counters = torch.zeros(2, dtype=torch.int64)
        engine_lanes.find_rows(lanes, layer, HEADS, counters, sinks=4, per_slot=4)
    assert compiled == ["_impose", "_find"]
