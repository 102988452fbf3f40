from pathlib import Path

import pytest
import torch
from torch import Tensor

from aquifer.compression.landmarks import MEANS_FILE, EncodedTokens, KeyMeans, KeyMeansError, TokenCodec
from aquifer.compression.spec import KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=3, head_dim=32, dtype=torch.float32, rope="{}")
CPU = torch.device("cpu")
MEANS = 4 * torch.randn(2, 96, generator=torch.Generator().manual_seed(9))


def kv(tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] of layer 1, keys with large means."""
    noise = torch.randn(2, tokens, 3, 32, generator=torch.Generator().manual_seed(tokens))
    return noise[0] + MEANS[1].view(3, 32), noise[1]


def decode_all(codec: TokenCodec, encoded: EncodedTokens) -> tuple[Tensor, Tensor]:
    tokens = len(encoded.rows)
    heads = torch.arange(3).repeat(tokens)
    keys, values = codec.decode_rows(1, heads, encoded.rows.flatten(0, 1))
    return keys.view(tokens, 3, 32), values.view(tokens, 3, 32)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().sum() / expected.square().sum()).item()


def test_rows_come_back_with_the_error_of_four_bits() -> None:
    keys, values = kv(500)
    found_keys, found_values = decode_all(
        codec := TokenCodec(SPEC, MEANS, CPU), codec.encode(1, keys, values)
    )
    assert relative(found_values, values) < 0.012
    assert relative(found_keys - MEANS[1].view(3, 32), keys - MEANS[1].view(3, 32)) < 0.012


def test_a_subset_of_rows_decodes_alone_bit_for_bit() -> None:
    codec = TokenCodec(SPEC, MEANS, CPU)
    encoded = codec.encode(1, *kv(100))
    keys, values = decode_all(codec, encoded)
    tokens, heads = torch.tensor([3, 99, 40]), torch.tensor([2, 0, 1])
    some_keys, some_values = codec.decode_rows(1, heads, encoded.rows[tokens, heads])
    assert torch.equal(some_keys, keys[tokens, heads])
    assert torch.equal(some_values, values[tokens, heads])


def test_means_make_landmarks_rank_better() -> None:
    keys, values = kv(2000)
    queries = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    exact = torch.einsum("hgd,thd->hgt", queries.view(3, 2, 32), keys).reshape(6, -1)
    hits = []
    for means in (MEANS, None):
        codec = TokenCodec(SPEC, means, CPU)
        encoded = codec.encode(1, keys, values)
        scores = codec.score(queries, encoded.codes, encoded.scales)
        best, true = (s.topk(50).indices for s in (scores, exact))
        hits.append(sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(best, true, strict=True)))
    with_means, without = hits
    assert with_means > 1.5 * without


def test_bytes_are_as_stated() -> None:
    codec = TokenCodec(SPEC, None, CPU)
    encoded = codec.encode(0, *kv(7))
    assert encoded.codes.shape == (7, 24) and encoded.scales.shape == (7, 3)
    assert codec.landmark_bytes == 2 * (24 + 6)
    assert encoded.rows.shape == (7, 3, codec.row_bytes) and codec.row_bytes == 16 + 16 + 2 + 2


def test_means_of_another_geometry_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        TokenCodec(SPEC, torch.zeros(2, 64), CPU)


def test_saved_means_come_back_and_only_for_their_model(tmp_path: Path) -> None:
    KeyMeans(MEANS, "this").save(tmp_path)
    assert torch.equal(KeyMeans.load(tmp_path, "this").means, MEANS)
    with pytest.raises(KeyMeansError, match="belongs to model this"):
        KeyMeans.load(tmp_path, "other")
    (tmp_path / MEANS_FILE).write_bytes(b"no tensors")
    with pytest.raises(KeyMeansError, match="damaged"):
        KeyMeans.load(tmp_path, "this")
    with pytest.raises(KeyMeansError, match="aquifer calibrate"):
        KeyMeans.load(tmp_path / "nowhere", "this")
