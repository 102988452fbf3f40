import pytest
import torch

from aquifer.compression.codec import make_codec
from aquifer.compression.raw import RawCodec
from aquifer.compression.spec import KVSpec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_gives_the_bits_back(dtype: torch.dtype) -> None:
    spec = KVSpec(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype, rope="{}")
    codec = make_codec("raw", spec, device=torch.device("cpu"), codec_dtype=torch.float32)
    counts = [7, 1, 4]
    keys, values = torch.randn(2, 3, 12, 16).to(dtype)
    keys[0, 0, 0] = torch.nan
    segments = codec.encode(keys, values, counts)
    assert [s.numel() for s in segments] == [codec.segment_bytes(n) for n in counts]

    decoder = codec.decoder(counts, torch.device("cpu"))
    for layer in range(3):
        sizes = [codec.layer_bytes(layer, n) for n in counts]
        slices = [s[layer * n : (layer + 1) * n] for s, n in zip(segments, sizes, strict=True)]
        k, v = decoder.decode_layer(slices)
        assert torch.equal(k.view(torch.uint8), keys[layer].view(torch.uint8))
        assert torch.equal(v.view(torch.uint8), values[layer].view(torch.uint8))


def test_the_wrong_shape_is_refused() -> None:
    spec = KVSpec(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, rope="{}")
    kv = torch.zeros(3, 5, 16)
    with pytest.raises(ValueError, match=r"\(3, 4, 16\)"):
        RawCodec(spec).encode(kv, kv, [4])
