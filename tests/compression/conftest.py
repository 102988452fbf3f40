"""Keys and values whose layers depend on each other, as those of a real model do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aquifer.compression.calibration import Corpus, calibrate
from aquifer.compression.predictors import Predictors
from aquifer.compression.sources import HeldSource
from aquifer.compression.spec import KVSpec

KVMaker = Callable[[int, int], tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def spec() -> KVSpec:
    return KVSpec(num_layers=5, num_kv_heads=2, head_dim=32, dtype=torch.float32, rope='{"theta":10000.0}')


@pytest.fixture(scope="session")
def make_kv(spec: KVSpec) -> KVMaker:
    """make_kv(tokens, seed): keys and values [L, T, C].

    Keys are a linear map of the keys of the layer before, values one of the layer's keys and of the values
    before, plus a fifth of noise; channels have means and very different sizes.
    """
    generator = torch.Generator().manual_seed(5)
    layers, channels = spec.num_layers, spec.channels
    size = torch.logspace(-1, 1, channels)[torch.randperm(channels, generator=generator)]
    mean = 3 * torch.randn(2, layers, channels, generator=generator)
    key_map = torch.randn(layers, channels, channels, generator=generator) / channels**0.5
    value_map = torch.randn(layers, 2 * channels, channels, generator=generator) / (2 * channels) ** 0.5

    def make(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, layers, tokens, channels, generator=torch.Generator().manual_seed(seed))
        keys, values = [noise[0, 0]], [noise[1, 0]]
        for layer in range(1, layers):
            keys.append(keys[-1] @ key_map[layer] + 0.2 * noise[0, layer])
            below = torch.cat((keys[-1], values[-1]), dim=1)
            values.append(below @ value_map[layer] + 0.2 * noise[1, layer])
        both = (torch.stack((torch.stack(keys), torch.stack(values))) + mean.unsqueeze(2)) * size
        return both[0], both[1]

    return make


@pytest.fixture(scope="session")
def predictors(spec: KVSpec, make_kv: KVMaker) -> Predictors:
    corpus = Corpus(HeldSource([make_kv(3000, 1)]), HeldSource([make_kv(500, 2)]), "planted maps", seed=1)
    return calibrate(
        corpus,
        spec,
        bits=2,
        model_fingerprint="planted",
        device=torch.device("cpu"),
        codec_dtype=torch.float32,
    )
