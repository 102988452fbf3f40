"""One-shot calibration: fit what AQUA-KV predicts each layer from.

Layer by layer, keys before values, a ridge regression is fitted from the reconstruction of everything
before, and then that half of the layer is coded and decoded, so that the next fit sees what the decoder
will see. The corpus is streamed; kept between layers are only the chain states, 4*C bytes per token in
bfloat16 (1.2 GB for 300,000 tokens of a 70B model), on the CPU if asked.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.compression.aqua import FIRST_LAYER_BITS, SIGNS_SEED, load_quantizer
from aquifer.compression.chain import Half, HalfCoder
from aquifer.compression.predictors import LayerFit, PredictorCard, Predictors
from aquifer.compression.sources import LayerSource
from aquifer.compression.spec import KVSpec
from aquifer.kernels.hadamard import Rotation
from aquifer.kernels.prediction import Constant, Linear, Prediction

RIDGE = 1e-3
STORED_DTYPE = torch.bfloat16
"""Dtype of stored weights. Their rounding adds about 1e-5 of the energy, a residual has 0.1 to 0.4 of it."""


@dataclass(frozen=True)
class Corpus:
    """What predictors are fitted on, and what they are judged by."""

    train: LayerSource
    heldout: LayerSource
    description: str
    """For the card: what was read, in words or as a path."""
    seed: int
    """For the card: the seed by which sequences were chosen."""


def calibrate(
    corpus: Corpus,
    spec: KVSpec,
    *,
    bits: int,
    model_fingerprint: str,
    device: torch.device,
    codec_dtype: torch.dtype,
    ridge: float = RIDGE,
    offload: bool = False,
    progress: Callable[[LayerFit], None] = lambda fit: None,
) -> Predictors:
    """Fit predictors for aqua:bits, reporting each layer to `progress`.

    ridge: λ as a share of the mean diagonal of X'X
    offload: keep the chain states on the CPU between layers
    Raises ValueError if the corpus has no tokens.
    """
    rotation = Rotation.of(spec.channels, SIGNS_SEED, device)
    resting = torch.device("cpu") if offload else device
    train = _Walk(corpus.train, rotation, codec_dtype, device, resting)
    heldout = _Walk(corpus.heldout, rotation, codec_dtype, device, resting)
    weights: dict[Half, list[Tensor]] = {half: [] for half in Half}
    biases: dict[Half, list[Tensor]] = {half: [] for half in Half}
    fits = []
    for layer in range(spec.num_layers):
        quantizer = load_quantizer(bits if layer else FIRST_LAYER_BITS, device)
        scores = []
        for half in Half:
            prediction: Prediction
            if layer == 0:
                prediction = Constant(_mean(train, half))
            else:
                stored, bias = _fit(train, layer, half, ridge)
                weights[half].append(stored)
                prediction = Linear(stored.to(codec_dtype), bias)
            biases[half].append(prediction.bias)
            coder = HalfCoder(half, prediction, quantizer, rotation.group)
            for state, target in train.batches(layer, half):
                coder.encode(state, target)
            scores.append(_score(heldout, layer, coder))
        by_figure = zip(*scores, strict=True)  # errors, shares explained, spreads: keys before values
        fits.append(LayerFit(layer, *itertools.chain.from_iterable(by_figure)))
        progress(fits[-1])
    card = PredictorCard(
        model_fingerprint=model_fingerprint,
        data=corpus.description,
        tokens=train.tokens,
        seed=corpus.seed,
        ridge=ridge,
        bits=bits,
        layers=fits,
    )
    return Predictors(
        key_mean=biases[Half.KEYS][0],
        value_mean=biases[Half.VALUES][0],
        key_weight=torch.stack(weights[Half.KEYS]),
        key_bias=torch.stack(biases[Half.KEYS][1:]),
        value_weight=torch.stack(weights[Half.VALUES]),
        value_bias=torch.stack(biases[Half.VALUES][1:]),
        card=card,
    )


class _Walk:
    """One pass after the other over a source, with the chain state of each of its batches."""

    def __init__(
        self,
        source: LayerSource,
        rotation: Rotation,
        dtype: torch.dtype,
        device: torch.device,
        resting: torch.device,
    ) -> None:
        self._source = source
        self._rotation = rotation
        self._device = device
        self._states = [
            torch.zeros(len(rows), 2 * rows.shape[1], dtype=dtype, device=resting)
            for rows in source.rows(0, Half.KEYS)
        ]
        self.tokens = sum(len(state) for state in self._states)
        if not self.tokens:
            raise ValueError("calibration and its held-out check both need at least one sequence")

    def batches(self, layer: int, half: Half) -> Iterator[tuple[Tensor, Tensor]]:
        """State [T, 2C], to be moved on in place, and rotated rows float32 [T, C] of every batch."""
        for kept, rows in zip(self._states, self._source.rows(layer, half), strict=True):
            state = kept.to(self._device)
            yield state, self._rotation.rotate(rows.to(self._device, torch.float32))
            if state is not kept:
                kept.copy_(state)


class _Moments:
    """Means and centred second moments of (x, y), streamed.

    Products of a batch are float32, sums over batches float64. Rows are taken relative to the first batch's
    mean, so that nothing cancels where means are large against deviations.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x_origin, self._y_origin = x.mean(dim=0), y.mean(dim=0)
        wide, narrow = x.shape[1], y.shape[1]
        self._count = 0
        self._x, self._y, self._xx, self._xy = (
            torch.zeros(shape, dtype=torch.float64, device=x.device)
            for shape in ((wide,), (narrow,), (wide, wide), (wide, narrow))
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: float32 [T, in], y: float32 [T, C]."""
        x, y = x - self._x_origin, y - self._y_origin
        self._count += len(x)
        self._x += x.sum(dim=0)
        self._y += y.sum(dim=0)
        self._xx += x.T @ x
        self._xy += x.T @ y

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight [in, C], rounded as it is stored, and the float32 bias [C] that goes with it."""
        mean_x, mean_y = self._x / self._count, self._y / self._count
        xx = self._xx - self._count * mean_x.outer(mean_x)
        xy = self._xy - self._count * mean_x.outer(mean_y)
        # A corpus shorter than the layer is wide, or constant channels, must still solve: hence the floor.
        penalty = max(ridge * xx.diagonal().mean().item(), 1e-12)
        factor = torch.linalg.cholesky(xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device))
        weight = torch.cholesky_solve(xy, factor).to(STORED_DTYPE)
        bias = (self._y_origin + mean_y) - (self._x_origin + mean_x) @ weight.double()
        return weight, bias.float()


def _mean(walk: _Walk, half: Half) -> Tensor:
    """float32 [C]: the mean of layer 0."""
    sums = [target.sum(dim=0, dtype=torch.float64) for _, target in walk.batches(0, half)]
    return (torch.stack(sums).sum(dim=0) / walk.tokens).float()


def _fit(walk: _Walk, layer: int, half: Half, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of the prediction of half of a layer."""
    moments: _Moments | None = None
    for state, target in walk.batches(layer, half):
        x = state.float()
        moments = moments or _Moments(x, target)
        moments.add(x, target)
    assert moments is not None  # a walk has at least one batch
    return moments.solve(ridge)


def _score(walk: _Walk, layer: int, coder: HalfCoder) -> tuple[float, float, float]:
    """Relative squared error after coding, share of the variance that the prediction explains, and spread.

    Moves the states on.
    """
    energy = wrong = unexplained = 0.0
    total = torch.zeros_like(coder.prediction.bias, dtype=torch.float64)
    for state, target in walk.batches(layer, coder.half):
        unexplained += (target - coder.prediction(state)).double().square().sum().item()
        coder.encode(state, target)
        wrong += (target - coder.half.of(state)).double().square().sum().item()
        energy += target.double().square().sum().item()
        total += target.sum(dim=0, dtype=torch.float64)
    variance = energy - total.square().sum().item() / walk.tokens
    spread = math.sqrt(variance / (walk.tokens * len(total)))
    return wrong / energy, 1.0 - unexplained / variance, spread
