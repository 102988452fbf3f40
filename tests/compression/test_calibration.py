from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aquifer.compression.aqua import SIGNS_SEED
from aquifer.compression.calibration import Corpus, calibrate
from aquifer.compression.predictors import LayerFit, Predictors, PredictorsError
from aquifer.compression.sources import HeldSource, LayerSource, SpilledSource
from aquifer.compression.spec import KVSpec
from aquifer.kernels.hadamard import Rotation

CPU = torch.device("cpu")
KVMaker = Callable[[int, int], tuple[Tensor, Tensor]]


def test_a_planted_map_is_recovered() -> None:
    """Without a ridge and with 4-bit inputs, the fitted map is the planted one in the rotated domain."""
    spec = KVSpec(num_layers=2, num_kv_heads=1, head_dim=16, dtype=torch.float32, rope="{}")
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 20_000, 16, generator=generator)
    key_map, from_keys, from_values = torch.randn(3, 16, 16, generator=generator) / 4
    keys[1] = keys[0] @ key_map + 2.0
    values[1] = keys[1] @ from_keys + values[0] @ from_values - 1.0
    corpus = Corpus(HeldSource([(keys, values)]), HeldSource([(keys[:, :500], values[:, :500])]), "", seed=0)
    fitted = calibrate(
        corpus, spec, bits=4, model_fingerprint="m", device=CPU, codec_dtype=torch.float32, ridge=0.0
    )

    rotation = Rotation.of(16, SIGNS_SEED, CPU)

    def unrotated(weight: Tensor) -> Tensor:
        return rotation.unrotate(rotation.unrotate(weight.float()).T.contiguous()).T

    # Noise in the inputs (4 bits: 0.8 % of the energy) shrinks a fit by about as much.
    torch.testing.assert_close(unrotated(fitted.key_weight[0][:16]), key_map, atol=0.02, rtol=0)
    torch.testing.assert_close(unrotated(fitted.value_weight[0][16:]), from_values, atol=0.03, rtol=0)
    bias = rotation.unrotate(fitted.key_bias)
    torch.testing.assert_close(bias, torch.full((1, 16), 2.0), atol=0.02, rtol=0)
    assert fitted.card.layers[1].key_explained > 0.98 and fitted.card.layers[1].value_explained > 0.98


def test_each_layer_is_reported_on_held_out_sequences(spec: KVSpec, make_kv: KVMaker) -> None:
    reported: list[LayerFit] = []
    corpus = Corpus(
        HeldSource([make_kv(800, 1), make_kv(700, 2)]), HeldSource([make_kv(300, 3)]), "planted", 7
    )
    predictors = calibrate(
        corpus,
        spec,
        bits=2,
        model_fingerprint="m",
        device=CPU,
        codec_dtype=torch.float32,
        progress=reported.append,
    )
    card = predictors.card
    assert card.layers == reported and [fit.layer for fit in reported] == list(range(spec.num_layers))
    assert (card.tokens, card.seed, card.bits, card.data) == (1500, 7, 2, "planted")
    assert abs(reported[0].key_explained) < 0.05
    assert all(fit.key_explained > 0.6 and fit.value_explained > 0.6 for fit in reported[1:])
    assert all(0 < fit.key_error < 0.1 and 0 < fit.value_error < 0.1 for fit in reported)
    for heldout, spreads in zip(
        make_kv(300, 3),
        zip(*((fit.key_spread, fit.value_spread) for fit in reported), strict=True),
        strict=True,
    ):
        # The rotation keeps the variance of a row, not that of each channel.
        torch.testing.assert_close(
            torch.tensor(spreads), heldout.var(dim=1).mean(dim=1).sqrt(), rtol=0.01, atol=0
        )


def test_spilled_and_offloaded_calibration_gives_the_same_predictors(
    spec: KVSpec, make_kv: KVMaker, tmp_path: Path
) -> None:
    sequences = [make_kv(600, 1), make_kv(500, 2)]
    heldout = HeldSource([make_kv(200, 3)])
    spilled = SpilledSource(tmp_path / "kv")
    for keys, values in sequences:
        spilled.append(keys, values)

    def fit(train: LayerSource, offload: bool) -> Predictors:
        return calibrate(
            Corpus(train, heldout, "", 0),
            spec,
            bits=3,
            model_fingerprint="m",
            device=CPU,
            codec_dtype=torch.float32,
            offload=offload,
        )

    held = fit(HeldSource(sequences), offload=False)
    assert fit(spilled, offload=False).hash == held.hash
    assert fit(SpilledSource(tmp_path / "kv"), offload=True).hash == held.hash


def test_a_corpus_shorter_than_a_layer_is_wide_still_fits(spec: KVSpec, make_kv: KVMaker) -> None:
    corpus = Corpus(HeldSource([make_kv(20, 1)]), HeldSource([make_kv(20, 2)]), "", 0)
    fitted = calibrate(corpus, spec, bits=2, model_fingerprint="m", device=CPU, codec_dtype=torch.float32)
    assert fitted.value_weight.isfinite().all()


def test_an_empty_corpus_is_refused(spec: KVSpec, make_kv: KVMaker) -> None:
    corpus = Corpus(HeldSource([make_kv(20, 1)]), HeldSource([]), "", 0)
    with pytest.raises(ValueError, match="at least one sequence"):
        calibrate(corpus, spec, bits=2, model_fingerprint="m", device=CPU, codec_dtype=torch.float32)


def test_saved_predictors_load_for_their_model(predictors: Predictors, tmp_path: Path) -> None:
    predictors.save(tmp_path)
    loaded = Predictors.load(tmp_path, "planted")
    assert loaded.hash == predictors.hash and loaded.card == predictors.card
    assert torch.equal(loaded.value_weight, predictors.value_weight)


def test_predictors_of_another_model_are_refused_with_the_way_out(
    predictors: Predictors, tmp_path: Path
) -> None:
    predictors.save(tmp_path)
    with pytest.raises(PredictorsError, match=r"planted, this is other: calibrate .* higgs:4"):
        Predictors.load(tmp_path, "other")


def test_missing_or_mixed_predictor_files_are_refused(predictors: Predictors, tmp_path: Path) -> None:
    with pytest.raises(PredictorsError, match="no predictors in"):
        Predictors.load(tmp_path, "planted")
    replace(predictors, key_bias=predictors.key_bias + 1).save(tmp_path / "a")
    predictors.save(tmp_path / "b")
    (tmp_path / "a" / "card.json").replace(tmp_path / "b" / "card.json")
    with pytest.raises(PredictorsError, match="not the file that its card describes"):
        Predictors.load(tmp_path / "b", "planted")


@pytest.mark.parametrize("text", ["{}", "not json", "[]", '{"hash": "0", "layers": [{}]}'])
def test_a_damaged_card_is_refused(text: str, predictors: Predictors, tmp_path: Path) -> None:
    predictors.save(tmp_path)
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(PredictorsError, match=r"card\.json is damaged"):
        Predictors.load(tmp_path, "planted")
