"""The calibrated part of AQUA-KV: what predicts a layer from what is already reconstructed.

PredictorsError(ValueError)   missing, damaged, or calibrated for another model
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

WEIGHTS_FILE = "predictors.safetensors"
CARD_FILE = "card.json"


class PredictorsError(ValueError):
    """Predictors that must not be used."""


@dataclass(frozen=True)
class LayerFit:
    """How well one layer is coded, measured on held-out sequences."""

    layer: int
    key_error: float
    """Relative squared error of the reconstructed keys: |K - K^|² / |K|²."""
    value_error: float
    key_explained: float
    """Share of the keys' variance that the prediction explains (layer 0: nothing is predicted)."""
    value_explained: float
    key_spread: float | None = None
    """Standard deviation of the rotated keys about their mean; cards from before aqua:*:int8 do not tell."""
    value_spread: float | None = None


@dataclass(frozen=True)
class PredictorCard:
    """Where predictors come from."""

    model_fingerprint: str
    data: str
    """What was read, in words or as a path."""
    tokens: int
    seed: int
    ridge: float
    """λ as a share of the mean diagonal of X'X."""
    bits: int
    """Bits of the residuals in the closed loop in which the predictors were fitted."""
    layers: list[LayerFit]

    @property
    def tells_spreads(self) -> bool:
        """Whether it says how values spread in every layer, so that predictions can be made in integers."""
        spreads = [(fit.key_spread, fit.value_spread) for fit in self.layers]
        return bool(spreads) and all(None not in spread for spread in spreads)


@dataclass(frozen=True)
class Predictors:
    """Means of layer 0 and linear maps of the others, all in the rotated domain.

    Keys of layer l from keys beside values of layer l-1, values of layer l from keys of layer l beside
    values of layer l-1. A map is y = x @ weight + bias; weights are bfloat16, everything else float32.
    """

    key_mean: Tensor
    """[C]"""
    value_mean: Tensor
    """[C]"""
    key_weight: Tensor
    """[L-1, 2C, C]; entry l-1 belongs to layer l."""
    key_bias: Tensor
    """[L-1, C]"""
    value_weight: Tensor
    """[L-1, 2C, C]"""
    value_bias: Tensor
    """[L-1, C]"""
    card: PredictorCard

    @property
    def num_layers(self) -> int:
        return self.key_weight.shape[0] + 1

    @property
    def channels(self) -> int:
        return self.key_mean.shape[0]

    def of_layer(self, layer: int) -> tuple[tuple[Tensor | None, Tensor], tuple[Tensor | None, Tensor]]:
        """(weight, bias) for the keys and for the values of a layer. Layer 0 has no weights: its means."""
        if layer == 0:
            return (None, self.key_mean), (None, self.value_mean)
        row = layer - 1
        return (self.key_weight[row], self.key_bias[row]), (self.value_weight[row], self.value_bias[row])

    def spread(self, layer: int, half: int) -> float:
        """Standard deviation of the rotated keys (half 0) or values of a layer about their mean; only where
        `card.tells_spreads`."""
        fit = self.card.layers[layer]
        spread = (fit.key_spread, fit.value_spread)[half]
        assert spread is not None
        return spread

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the tensors, in hex."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the weights and, beside them, the card."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not save_file: it makes files that only their owner can read.
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        (folder / WEIGHTS_FILE).write_bytes(save(tensors))
        card = asdict(self.card) | {"hash": self.hash}
        (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, model_fingerprint: str) -> "Predictors":
        """Read predictors calibrated for this model. Raises PredictorsError for any others."""
        card, stored_hash = read_card(folder)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
            predictors = cls(**tensors, card=card)
        except FileNotFoundError as error:
            raise _none_in(folder) from error
        except (SafetensorError, TypeError) as error:
            raise PredictorsError(f"{folder / WEIGHTS_FILE} is damaged: {error}") from error
        if predictors.hash != stored_hash:
            raise PredictorsError(f"{folder / WEIGHTS_FILE} is not the file that its card describes")
        if predictors.card.model_fingerprint != model_fingerprint:
            raise PredictorsError(
                f"the predictors in {folder} were calibrated for model {predictors.card.model_fingerprint}, "
                f"this is {model_fingerprint}: calibrate this model with `aquifer calibrate`, "
                "or use the codec higgs:4"
            )
        return predictors

    def _tensors(self) -> dict[str, Tensor]:
        names = ("key_mean", "value_mean", "key_weight", "key_bias", "value_weight", "value_bias")
        return {name: getattr(self, name) for name in names}


def read_card(folder: Path) -> tuple[PredictorCard, str]:
    """The card of the predictors in a folder, and the hash that it gives of them. Raises PredictorsError."""
    try:
        card = json.loads((folder / CARD_FILE).read_text())
        stored_hash = card.pop("hash")
        layers = [LayerFit(**fit) for fit in card.pop("layers")]
        return PredictorCard(**card, layers=layers), str(stored_hash)
    except FileNotFoundError as error:
        raise _none_in(folder) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # ValueError: of JSON and Unicode
        raise PredictorsError(f"{folder / CARD_FILE} is damaged: {error}") from error


def _none_in(folder: Path) -> PredictorsError:
    return PredictorsError(
        f"no predictors in {folder}: make them with `aquifer calibrate`, or use the codec higgs:4"
    )
