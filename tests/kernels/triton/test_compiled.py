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
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelInterface

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels.triton.attention import attend_pages, merge_parts
from aquifer.kernels.triton.chain import decode_rows, encode_rows, predict, predict_and_add
from aquifer.kernels.triton.emit import emit
from aquifer.kernels.triton.gather import gather_slices
from aquifer.kernels.triton.higgs import higgs_decode_add, higgs_encode
from aquifer.kernels.triton.landmarks import score_landmarks
from aquifer.kernels.triton.lanes import NOBODY, lay_out
from aquifer.kernels.triton.norms import add_rms_norm, rms_norm, swiglu
from aquifer.kernels.triton.rope import rotate_and_store
from aquifer.kernels.triton.rows import fetch_rows, find_rows
from aquifer.kernels.triton.select import select_tokens

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 232_448  # of one block on an H100 or H200
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

HEADS, GROUP, HEAD_DIM, PAGES = 8, 4, 128, 16
SLOTS = PAGES * 256


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


@pytest.mark.parametrize("sets", [1, HEADS])
def test_selecting_tokens_compiles(sets: int, compiled: _Compiled) -> None:
    lanes, lists = torch.zeros(2, len(NOBODY), dtype=torch.int64), int32(2, sets, 512)
    lay_out(lanes, lists, int32(2), sinks=4)
    partial_lse = score_landmarks(
        torch.zeros(2, HEADS * GROUP, HEAD_DIM, dtype=torch.bfloat16),
        torch.ones(HEAD_DIM),
        torch.zeros(SLOTS, HEADS * HEAD_DIM // 4, dtype=torch.uint8),
        torch.zeros(SLOTS, HEADS, dtype=torch.float16),
        torch.zeros(256, 4),
        lanes,
        first=4,
    )
    select_tokens(lanes, partial_lse, sets, first=4)
    find_rows(lanes, 3, lists, torch.zeros(2, dtype=torch.int64), sinks=4)
    expected = ["_lay_out", "_tabulate", "_score", "_rank", "_refine", "_choose", "_find_rows"]
    assert compiled == expected


@pytest.mark.parametrize("page_tokens", [1, 256])
def test_attention_compiles(page_tokens: int, compiled: _Compiled) -> None:
    pool = torch.zeros(HEADS, SLOTS, HEAD_DIM, dtype=torch.bfloat16)
    q = torch.zeros(2, HEADS * GROUP, HEAD_DIM, dtype=torch.bfloat16)
    attend_pages(q, pool, pool, int32(2, SLOTS // page_tokens), int32(2), page_tokens=page_tokens)
    assert compiled == ["_attend_split", "_merge_splits"]


@pytest.mark.parametrize("count", [2, 8])
def test_merging_attention_compiles(count: int, compiled: _Compiled) -> None:
    out = torch.zeros(512, HEADS * GROUP, HEAD_DIM, dtype=torch.bfloat16).transpose(0, 1)
    merge_parts([(out, torch.zeros(HEADS * GROUP, 512))] * count)
    assert compiled == ["_merge_parts"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding_and_encoding_compile(bits: int, compiled: _Compiled) -> None:
    quantizer = load_quantizer(bits, torch.device("cpu"))
    channels = HEADS * HEAD_DIM
    base, codes = torch.zeros(32, channels), torch.zeros(32, channels * bits // 8, dtype=torch.uint8)
    state = torch.zeros(32, 2 * channels, dtype=torch.bfloat16)
    scale = torch.zeros(32, 1, dtype=torch.float16)
    higgs_decode_add(base, codes, scale, quantizer, out=state[:, channels:])
    higgs_encode(base, quantizer, channels)
    assert compiled == ["_decode_add", "_encode"]


@pytest.mark.parametrize(
    ("sets", "dtype"), [(1, torch.bfloat16), (HEADS, torch.bfloat16), (1, torch.float32)]
)
def test_fetching_rows_compiles(sets: int, dtype: torch.dtype, compiled: _Compiled) -> None:
    pool = torch.zeros(HEADS, SLOTS, HEAD_DIM, dtype=dtype)
    fetch_rows(
        torch.zeros(2, len(NOBODY), dtype=torch.int64),
        int32(2, sets),
        torch.zeros(SLOTS, HEADS * (HEAD_DIM + 4), dtype=torch.uint8),
        torch.zeros(256, 2),
        torch.ones(HEAD_DIM),
        torch.zeros(HEADS, HEAD_DIM),
        pool,
        pool,
    )
    assert compiled == ["_fetch_rows"]


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [(HEADS, HEAD_DIM, torch.bfloat16), (HEADS, HEAD_DIM, torch.float32), (2, 64, torch.bfloat16)],
)
def test_emitting_compiles(heads: int, head_dim: int, dtype: torch.dtype, compiled: _Compiled) -> None:
    channels = heads * head_dim
    pool = torch.zeros(heads, SLOTS, head_dim, dtype=dtype)
    state, angles = torch.zeros(64, 2 * channels, dtype=dtype), torch.zeros(64, head_dim, dtype=dtype)
    emit(state, torch.ones(channels), channels, (angles, angles), int32(64), pool, pool)
    assert compiled == ["_emit"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_step_of_the_chain_compiles(bits: int, compiled: _Compiled) -> None:
    quantizer = load_quantizer(bits, torch.device("cpu"))
    channels = HEADS * HEAD_DIM
    ring = torch.zeros(64, 3 * channels, dtype=torch.bfloat16)
    state, half = ring[:, : 2 * channels], ring[:, 2 * channels :]
    weight, bias = torch.zeros(2 * channels, channels, dtype=torch.bfloat16), torch.zeros(2, channels)
    data, offsets, wide = torch.zeros(64, dtype=torch.uint8), int32(4, 64), torch.zeros(64, channels)
    decode_rows(data, offsets, quantizer, channels, bias, state)
    predict(state, 0, weight, bias[0], channels, wide)
    encode_rows(half, bias[0], channels, wide, quantizer, 1, offsets, data, half, int32(64))
    assert compiled == ["_decode_rows", "_step", "_encode_rows"]
    # Its epilogue holds a tile and its residual: some registers go to memory, once per tile.
    compiled.spills_bytes = 600
    predict_and_add(state, 1, weight, bias[1], channels, data, offsets, quantizer, half)


def test_gathering_slices_compiles(compiled: _Compiled) -> None:
    addresses = torch.zeros(128, dtype=torch.int64)
    gather_slices(addresses, int32(128), int32(128), 132_096, torch.zeros(64, dtype=torch.uint8))
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
    find_rows(lanes, 1, int32(1, 1, 1), torch.zeros(2, dtype=torch.int64), sinks=1)
    rows, grid = torch.zeros(256, 68, dtype=torch.uint8), torch.zeros(256, 2)
    fetch_rows(lanes, int32(1, 1), rows, grid, signs, torch.zeros(1, 64), pool, pool)
    angles = torch.zeros(1, 64)
    emit(torch.zeros(1, 128), torch.ones(64), 64, (angles, angles), int32(1), pool, pool)
    higgs_encode(torch.zeros(1, 64), load_quantizer(2, torch.device("cpu")), 64)
    assert compiled == [
        *(
            "_attend_split",
            "_merge_splits",
            "_tabulate",
            "_score",
            "_rank",
            "_refine",
            "_choose",
            "_find_rows",
        ),
        *("_fetch_rows", "_emit", "_encode"),
    ]
