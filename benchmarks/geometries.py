"""What is measured: models of known shapes with random weights, and the bundled model with its own.

Speed does not depend on what weights say, so no checkpoint has to be downloaded. A random model is
written as an ordinary checkpoint and loaded the way a user's would be; so is a set of random predictors.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.utils import logging as transformers_logging

from aquifer.compression.codec import Codec, make_codec
from aquifer.compression.predictors import LayerFit, PredictorCard, Predictors
from aquifer.compression.spec import KVSpec
from aquifer.server.models.adapter import checkpoint_fingerprint
from aquifer.server.settings import REFERENCE_MODEL

MAX_TOKENS = 1 << 18
"""Longest sequence of a random model. More than some were published with, so that every geometry can be
measured at 128k tokens."""

_SEED = 0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def _llama3_rope(factor: float) -> dict[str, str | float]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama_8b() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters=_llama3_rope(8.0),
    )


def _llama_3b() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters=_llama3_rope(32.0),
        tie_word_embeddings=True,
    )


def _qwen3_8b() -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )


GEOMETRIES = {"llama-3.1-8b": _llama_8b, "llama-3.2-3b": _llama_3b, "qwen3-8b": _qwen3_8b}
REFERENCE = "reference"


def config_of(geometry: str, layers: int | None) -> PreTrainedConfig:
    """The configuration of a named geometry, cut to its first `layers`.

    Raises ValueError for an unknown name, for more layers than there are, and for a cut bundled model.
    """
    if geometry == REFERENCE:
        if layers is not None:
            raise ValueError(
                "the bundled model is measured whole; layers can be left out of random ones only"
            )
        return AutoConfig.from_pretrained(REFERENCE_MODEL)
    if geometry not in GEOMETRIES:
        raise ValueError(f"no geometry {geometry!r}; there are {', '.join([*GEOMETRIES, REFERENCE])}")
    config = GEOMETRIES[geometry]()
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"{geometry} has {config.num_hidden_layers} layers, not {layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


@dataclass(frozen=True)
class Subject:
    """A checkpoint to be measured, on disk, with predictors beside it."""

    geometry: str
    folder: Path
    config: PreTrainedConfig
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, and keeps its KV in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def spec(self) -> KVSpec:
        return KVSpec(
            num_layers=self.config.num_hidden_layers,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            rope=json.dumps(dict(self.config.rope_parameters), sort_keys=True, default=float),
        )

    @property
    def is_random(self) -> bool:
        return self.geometry != REFERENCE

    @property
    def notes(self) -> list[str]:
        """What a reader of its figures has to know."""
        return ["random weights and random predictors: figures of speed only"] if self.is_random else []

    def codec(self, name: str) -> Codec:
        """The codec `name` for this model, on its device."""
        predictors = None
        if name.startswith("aqua"):
            folder = self.folder / "predictors"
            card = json.loads((folder / "card.json").read_text())
            predictors = Predictors.load(folder, card["model_fingerprint"])
        codec_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return make_codec(name, self.spec, device=self.device, codec_dtype=codec_dtype, predictors=predictors)


def make_subject(geometry: str, layers: int | None, device: torch.device, weights: Path) -> Subject:
    """The checkpoint of a geometry; a random one is written below `weights` unless it is there already.

    Raises ValueError as `config_of` does.
    """
    transformers_logging.disable_progress_bar()
    config = config_of(geometry, layers)
    if geometry == REFERENCE:
        return Subject(geometry, REFERENCE_MODEL, config, device)
    folder = weights / f"{geometry}-{config.num_hidden_layers}-layers"
    if not folder.exists():
        # Under another name first, so that an interrupted run leaves nothing that looks whole.
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _write_checkpoint(config, unfinished, device)
        unfinished.rename(folder)
    return Subject(geometry, folder, config, device)


def _write_checkpoint(config: PreTrainedConfig, folder: Path, device: torch.device) -> None:
    torch.manual_seed(_SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in _TOKENIZER_FILES:  # only there to be loaded: prompts are random token ids
        shutil.copy(REFERENCE_MODEL / name, folder / name)
    with torch.device("meta"):  # the fingerprint is taken from files and config
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    random_predictors(config, checkpoint_fingerprint(loaded, folder)).save(folder / "predictors")


def random_predictors(config: PreTrainedConfig, fingerprint: str) -> Predictors:
    """Predictors of the right shape that predict noise, small enough that states stay bounded."""
    channels = config.num_key_value_heads * config.head_dim
    rows = config.num_hidden_layers - 1
    draw = torch.Generator().manual_seed(_SEED)

    def weight() -> torch.Tensor:
        values = torch.randn(rows, 2 * channels, channels, generator=draw)
        return (values * (0.25 / channels**0.5)).bfloat16()

    # Nothing is explained, and rotated values spread like hidden states times random weights.
    figures = (1.0, 1.0, 0.0, 0.0, *[config.initializer_range * config.hidden_size**0.5] * 2)
    card = PredictorCard(
        model_fingerprint=fingerprint,
        data="none: random numbers",
        tokens=0,
        seed=_SEED,
        ridge=0.0,
        bits=2,
        layers=[LayerFit(layer, *figures) for layer in range(rows + 1)],
    )
    return Predictors(
        key_mean=torch.zeros(channels),
        value_mean=torch.zeros(channels),
        key_weight=weight(),
        key_bias=torch.zeros(rows, channels),
        value_weight=weight(),
        value_bias=torch.zeros(rows, channels),
        card=card,
    )
