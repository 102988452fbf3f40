"""AQUA-KV in kernels against the plain codec."""

from __future__ import annotations

import pytest
import torch
from fused_codecs import COUNTS, DTYPE, NAMES, codec_pair, kv, layers_of

from aquifer.compression.fused import fits
from aquifer.compression.spec import KVSpec

GROUPINGS = [[0, 1, 2], [2], [1, 0]]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a codec."""
    return request.param


def test_both_codecs_read_the_same_bytes(name: str, device: torch.device, launched: list[str]) -> None:
    fused, plain = codec_pair(name, device)
    keys, values = kv(sum(COUNTS), device)
    segments = fused.encode(keys, values, COUNTS)
    assert [s.numel() for s in segments] == [fused.segment_bytes(n) for n in COUNTS]
    found, expected = (layers_of(codec, segments, COUNTS).float() for codec in (fused, plain))
    # A value in the middle between two of the state's numbers may go either way, layer after layer.
    assert (found - expected).norm() < 0.02 * expected.norm()
    truth = torch.stack((keys, values), dim=1).float()
    assert (found - truth).norm() < {"2": 0.5, "3": 0.25}[name.split(":")[1]] * truth.norm()
    assert fused.fingerprint != plain.fingerprint


def test_segments_decode_alike_in_any_grouping(name: str, device: torch.device, launched: list[str]) -> None:
    """Bit for bit, and to what the encoder had."""
    fused, _ = codec_pair(name, device)
    segments = fused.encode(*kv(sum(COUNTS), device), COUNTS)
    together = dict(enumerate(layers_of(fused, segments, COUNTS).split(COUNTS, dim=2)))
    for chosen in GROUPINGS:
        counts = [COUNTS[i] for i in chosen]
        apart = layers_of(fused, [segments[i] for i in chosen], counts).split(counts, dim=2)
        assert all(torch.equal(part, together[i]) for part, i in zip(apart, chosen, strict=True))


def test_a_segment_does_not_depend_on_its_batch(device: torch.device, launched: list[str]) -> None:
    fused, _ = codec_pair("aqua:2", device)
    keys, values = kv(6, device)
    together = fused.encode(keys, values, [2, 4])
    alone = fused.encode(keys[:, 2:], values[:, 2:], [4])
    assert torch.equal(together[1], alone[0])


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_values_that_are_not_finite_are_refused(device: torch.device, launched: list[str]) -> None:
    fused, _ = codec_pair("aqua:2", device)
    keys, values = kv(12, device)
    values[2, 7, 5] = torch.nan
    with pytest.raises(ValueError, match="values that are not finite"):
        fused.encode(keys, values, [5, 7])
    encoded = fused.encode_unchecked(keys, values, [5, 7])
    assert encoded.damaged is not None and encoded.damaged.nonzero().flatten().tolist() == [7]
    whole = fused.encode(keys[:, :5], values[:, :5], [5])
    assert torch.equal(encoded.bodies[0], whole[0])


def test_only_geometries_of_the_kernels_fit() -> None:
    def spec(heads: int, head_dim: int) -> KVSpec:
        return KVSpec(num_layers=2, num_kv_heads=heads, head_dim=head_dim, dtype=DTYPE, rope="{}")

    assert fits(spec(8, 128), torch.bfloat16) and fits(spec(5, 128), torch.float16)
    assert not fits(spec(8, 128), torch.float32)
    assert not fits(spec(3, 64), torch.bfloat16)  # 192 channels are no whole tiles
    assert not fits(spec(8, 96), torch.bfloat16)
