from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquifer.compression.codec import Codec, make_codec
from aquifer.compression.predictors import Predictors, PredictorsError
from aquifer.compression.spec import SEGMENT_TOKENS, KVSpec
from aquifer.compression.wire import record_bytes

CPU = torch.device("cpu")
KVMaker = Callable[[int, int], tuple[Tensor, Tensor]]
NAMES = [*(f"{family}:{bits}" for family in ("aqua", "higgs") for bits in (2, 3, 4)), "aqua:2:int8"]
COUNTS = [252, 256, 256, 7]


def codec_of(
    name: str, spec: KVSpec, predictors: Predictors | None, dtype: torch.dtype = torch.float32
) -> Codec:
    return make_codec(name, spec, device=CPU, codec_dtype=dtype, predictors=predictors)


def decode(
    codec: Codec, segments: Sequence[Tensor], counts: Sequence[int], device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Keys and values [L, T, C]."""
    decoder = codec.decoder(counts, device)
    sizes = [[codec.layer_bytes(layer, n) for layer in range(codec.spec.num_layers)] for n in counts]
    by_layer = zip(*(s.split(size) for s, size in zip(segments, sizes, strict=True)), strict=True)
    keys, values = zip(*(decoder.decode_layer(slices) for slices in by_layer), strict=True)
    return torch.stack(keys), torch.stack(values)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Squared error relative to the energy, averaged over layers."""
    wrong = (found.float() - expected).square().sum(dim=(1, 2))
    return (wrong / expected.square().sum(dim=(1, 2))).mean().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_and_decoder_end_in_the_same_state(
    name: str,
    dtype: torch.dtype,
    spec: KVSpec,
    make_kv: KVMaker,
    predictors: Predictors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = codec_of(name, spec, predictors, dtype)
    states: list[Tensor] = []

    def remember(tokens: int, device: torch.device) -> Tensor:
        states.append(torch.zeros(tokens, 2 * spec.channels, dtype=dtype))
        return states[-1]

    monkeypatch.setattr(codec, "new_state", remember)
    segments = codec.encode(*make_kv(sum(COUNTS), 3), COUNTS)
    assert [s.numel() for s in segments] == [codec.segment_bytes(n) for n in COUNTS]
    keys, _ = decode(codec, segments, COUNTS)
    encoder_state, decoder_state = states
    assert torch.equal(encoder_state, decoder_state)
    assert encoder_state.any() and keys.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_decode_alike_in_any_grouping(
    dtype: torch.dtype, spec: KVSpec, make_kv: KVMaker, predictors: Predictors
) -> None:
    codec = codec_of("aqua:2", spec, predictors, dtype)
    counts = [256] * 5
    segments = codec.encode(*make_kv(sum(counts), 4), counts)
    together = decode(codec, segments, counts)
    apart = [decode(codec, [segments[i]], [256]) for i in (3, 0)]
    for (keys, values), i in zip(apart, (3, 0), strict=True):
        tokens = slice(256 * i, 256 * (i + 1))
        assert relative_error(keys, together[0][:, tokens].float()) <= 1e-6
        assert relative_error(values, together[1][:, tokens].float()) <= 1e-6


def test_a_segment_does_not_depend_on_what_follows_it(
    spec: KVSpec, make_kv: KVMaker, predictors: Predictors
) -> None:
    codec = codec_of("aqua:2", spec, predictors)
    keys, values = make_kv(1024, 6)
    other_keys, other_values = make_kv(1024, 7)
    other_keys[:, :512], other_values[:, :512] = keys[:, :512], values[:, :512]
    ours = codec.encode(keys, values, [256] * 4)
    theirs = codec.encode(other_keys, other_values, [256] * 4)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
    assert not torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.06), (3, 0.02), (4, 0.005)])
def test_prediction_beats_plain_higgs_at_equal_bits(
    bits: int, bound: float, spec: KVSpec, make_kv: KVMaker, predictors: Predictors
) -> None:
    keys, values = make_kv(600, 8)
    error = {}
    for family in ("aqua", "higgs"):
        codec = codec_of(f"{family}:{bits}", spec, predictors)
        found = decode(codec, codec.encode(keys, values, [600]), [600])
        error[family] = (relative_error(found[0], keys) + relative_error(found[1], values)) / 2
    assert error["aqua"] < error["higgs"] / 3 and error["aqua"] < bound, error


def test_errors_do_not_build_up_over_layers(spec: KVSpec, make_kv: KVMaker, predictors: Predictors) -> None:
    keys, values = make_kv(600, 9)
    codec = codec_of("aqua:2", spec, predictors)
    found, _ = decode(codec, codec.encode(keys, values, [600]), [600])
    wrong = (found - keys).square().sum(dim=(1, 2)) / keys.square().sum(dim=(1, 2))
    assert wrong[-1] < 2 * wrong[1]


def test_two_bits_cost_at_most_2_10_on_the_wire() -> None:
    """Scales, header and checksum counted; predictors do not change the size."""
    llama = KVSpec(num_layers=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, rope="{}")
    codec = codec_of("higgs:2", llama, None)
    values = 2 * llama.num_layers * llama.channels * SEGMENT_TOKENS
    assert record_bytes(codec.segment_bytes(SEGMENT_TOKENS)) * 8 / values <= 2.10


@pytest.mark.parametrize("bits", [2, 4])
def test_predictions_in_integers_cost_little(
    bits: int, spec: KVSpec, make_kv: KVMaker, predictors: Predictors
) -> None:
    keys, values = make_kv(600, 8)
    errors = []
    for name in (f"aqua:{bits}:int8", f"aqua:{bits}"):
        codec = codec_of(name, spec, predictors)
        assert codec.name == name
        found = decode(codec, codec.encode(keys, values, [600]), [600])
        errors.append(relative_error(found[0], keys) + relative_error(found[1], values))
    assert errors[0] < 1.05 * errors[1]


def test_integers_need_to_know_how_values_spread(spec: KVSpec, predictors: Predictors) -> None:
    fits = [replace(fit, value_spread=None) for fit in predictors.card.layers]
    older = replace(predictors, card=replace(predictors.card, layers=fits))
    assert codec_of("aqua:2", spec, older).fingerprint == codec_of("aqua:2", spec, predictors).fingerprint
    for name, same_bits in (("aqua:2:int8", "aqua:2"), ("aqua:4:int8", "aqua:4")):
        with pytest.raises(PredictorsError, match=f"calibrate this model again.* or use {same_bits}$"):
            codec_of(name, spec, older)
    fits = [replace(fit, key_spread=2.0) for fit in predictors.card.layers]
    wider = replace(predictors, card=replace(predictors.card, layers=fits))
    fingerprints = {codec_of("aqua:2:int8", spec, maps).fingerprint for maps in (wider, predictors)}
    assert len(fingerprints) == 2


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_any_token_counts_round_trip(
    spec: KVSpec, make_kv: KVMaker, predictors: Predictors, counts: list[int]
) -> None:
    codec = codec_of("aqua:3", spec, predictors)
    keys, values = make_kv(sum(counts), 10)
    segments = codec.encode(keys, values, counts)
    assert [s.numel() for s in segments] == [codec.segment_bytes(n) for n in counts]
    found = decode(codec, segments, counts)
    assert relative_error(found[0], keys) < 0.02 and relative_error(found[1], values) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_decodes_like_the_cpu(
    name: str, spec: KVSpec, make_kv: KVMaker, predictors: Predictors
) -> None:
    device = torch.device("cuda")
    keys, values = make_kv(512, 12)
    codec = make_codec(name, spec, device=device, codec_dtype=torch.bfloat16, predictors=predictors)
    segments = codec.encode(keys.to(device), values.to(device), [256, 256])
    assert all(segment.is_cuda for segment in segments)
    on_gpu = decode(codec, segments, [256, 256], device)
    twin = codec_of(name, spec, predictors, torch.bfloat16)
    on_cpu = decode(twin, [segment.cpu() for segment in segments], [256, 256])
    assert twin.fingerprint == codec.fingerprint
    for found, expected, truth in zip(on_gpu, on_cpu, (keys, values), strict=True):
        assert relative_error(found.cpu(), expected.float()) <= 1e-6
        assert relative_error(found.cpu(), truth) < 0.15


def test_channels_that_are_no_power_of_two_are_coded_in_groups() -> None:
    odd = KVSpec(num_layers=2, num_kv_heads=3, head_dim=32, dtype=torch.float32, rope="{}")
    codec = codec_of("higgs:4", odd, None)
    keys, values = torch.randn(2, 2, 50, 96, generator=torch.Generator().manual_seed(0))
    assert codec.layer_bytes(0, 50) == 50 * 2 * (48 + 2 * 3) + 8  # padded to 16 bytes
    assert relative_error(decode(codec, codec.encode(keys, values, [50]), [50])[0], keys) < 0.01


def test_zero_rows_come_back_as_zeros() -> None:
    small = KVSpec(num_layers=2, num_kv_heads=1, head_dim=32, dtype=torch.float32, rope="{}")
    codec = codec_of("higgs:2", small, None)
    keys, values = torch.randn(2, 2, 6, 32)
    keys[:, 3] = 0
    found, _ = decode(codec, codec.encode(keys, values, [6]), [6])
    assert not found[:, 3].any() and found[:, 2].all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(
    bad: float, spec: KVSpec, make_kv: KVMaker, predictors: Predictors
) -> None:
    keys, values = make_kv(5, 11)
    values[2, 3, 4] = bad
    with pytest.raises(ValueError, match="values hold values that are not finite"):
        codec_of("aqua:2", spec, predictors).encode(keys, values, [5])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_unchecked_such_values_are_marked_and_other_segments_unharmed(
    bad: float, spec: KVSpec, make_kv: KVMaker, predictors: Predictors
) -> None:
    codec, (keys, values) = codec_of("aqua:2", spec, predictors), make_kv(9, 11)
    sound = codec.encode(keys, values, [2, 4, 3])
    assert codec.encode_unchecked(keys, values, [2, 4, 3]).damaged is None
    keys[1, 2, 0], values[2, 3, 4] = bad, bad
    encoded = codec.encode_unchecked(keys, values, [2, 4, 3])
    assert encoded.damaged is not None and encoded.damaged.nonzero()[:, 0].tolist() == [2, 3]
    assert torch.equal(encoded.bodies[0], sound[0]) and torch.equal(encoded.bodies[2], sound[2])


def test_fingerprints_tell_codecs_apart(spec: KVSpec, predictors: Predictors) -> None:
    codecs = [
        codec_of(name, spec, predictors, dtype) for name in NAMES for dtype in (torch.float32, torch.bfloat16)
    ]
    codecs.append(codec_of("raw", spec, None))
    assert len({codec.fingerprint for codec in codecs}) == len(codecs)
    again = codec_of("aqua:2", spec, predictors)
    assert again.fingerprint == codecs[0].fingerprint
    shifted = replace(predictors, key_mean=predictors.key_mean + 1e-3)
    assert codec_of("aqua:2", spec, shifted).fingerprint != again.fingerprint
    other_rope = replace(spec, rope='{"theta":500000.0}')
    assert codec_of("aqua:2", other_rope, predictors).fingerprint != again.fingerprint


@pytest.mark.parametrize(
    "name", ["aqua:5", "aqua", "zip", "higgs:2:1", "higgs:2:int8", "aqua:2:", "aqua:2:fp8"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(
    name: str, spec: KVSpec, predictors: Predictors
) -> None:
    with pytest.raises(ValueError, match="use raw, aqua:2"):
        codec_of(name, spec, predictors)


def test_aqua_without_fitting_predictors_is_refused_with_the_way_out(
    spec: KVSpec, predictors: Predictors
) -> None:
    with pytest.raises(ValueError, match="aquifer calibrate"):
        codec_of("aqua:2", spec, None)
    with pytest.raises(ValueError, match="do not fit 6 layers"):
        codec_of("aqua:2", replace(spec, num_layers=6), predictors)
