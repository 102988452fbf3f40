"""The shapes of the models that are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aquifer.benchmarks.geometries import Subject, config_of, make_subject
from aquifer.server.engine.build import choose_codec, load_model
from aquifer.server.settings import Settings


@pytest.mark.parametrize(
    ("geometry", "layers", "bytes_per_token"),
    [
        ("llama-3.1-8b", None, 131_072),
        ("llama-3.2-3b", None, 114_688),
        ("qwen3-8b", None, 147_456),
        ("llama-3.1-8b", 4, 16_384),
        ("qwen3-8b", 4, 16_384),
    ],
)
def test_kv_has_the_published_size_per_token(
    geometry: str, layers: int | None, bytes_per_token: int, tmp_path: Path
) -> None:
    subject = Subject(geometry, tmp_path, config_of(geometry, layers), torch.device("cuda"))
    assert subject.dtype == torch.bfloat16
    assert subject.spec.bytes_per_token == bytes_per_token


@pytest.mark.parametrize(
    ("geometry", "layers", "words"),
    [("llama-9", None, "there are llama-3.1-8b"), ("qwen3-8b", 37, "36 layers"), ("reference", 2, "whole")],
)
def test_what_does_not_exist_is_refused(geometry: str, layers: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(geometry, layers)


def test_a_random_checkpoint_loads_like_any_other_with_its_predictors(tiny: None, weights: Path) -> None:
    subject = make_subject("tiny", None, torch.device("cpu"), weights)
    settings = Settings(model=str(subject.folder), device="cpu", codec="aqua:2")
    loaded = load_model(settings)
    codec, note = choose_codec(settings, loaded)
    assert (codec.name, note) == ("aqua:2", None)
    assert loaded.adapter.spec == subject.spec
    assert codec.fingerprint == subject.codec("aqua:2").fingerprint
    assert subject.is_random and subject.notes


def test_the_bundled_model_is_measured_with_its_own_predictors(tmp_path: Path) -> None:
    subject = make_subject("reference", None, torch.device("cpu"), tmp_path)
    assert not subject.is_random and not subject.notes
    assert subject.codec("aqua:2").name == "aqua:2"
    assert not list(tmp_path.iterdir())
