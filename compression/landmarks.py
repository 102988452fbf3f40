"""How tokens are kept for selective decoding: a 2-bit landmark on the device, 4-bit rows in host memory.

Unlike segments, which are decoded as a whole, these are read one token at a time, so nothing is predicted
from other layers: each head of each token stands alone, less a calibrated mean. Keys are kept *after* RoPE,
because they are compared with queries right away.

    landmark, per token and head   codes uint8 [D/4], scales float16 [D/G]
    row, per token and head        uint8 [D/2 + D/2 + 2*D/G + 2*D/G]: key codes, value codes, both scales

Source: YAKV in "KV-Cache Offloading for Context-Intensive Tasks", arXiv 2604.08426; subtracting the mean
and the random signs are ours (figures in workloads/README.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aquifer.compression.aqua import SCALE_BYTES, load_quantizer
from aquifer.compression.spec import KVSpec
from aquifer.kernels.hadamard import hadamard, hadamard_group, random_signs
from aquifer.kernels.higgs import Quantizer, higgs_decode_add, higgs_encode
from aquifer.kernels.landmarks import score_landmarks

MEANS_FILE = "key_means.safetensors"
LANDMARK_BITS = 2
ROW_BITS = 4
_SIGNS_SEED = 0x1A4D


class KeyMeansError(ValueError):
    """Means that must not be used: missing, damaged, or another model's."""


@dataclass(frozen=True)
class KeyMeans:
    """Mean of every channel of the keys after RoPE, over the positions of the calibration texts."""

    means: Tensor
    """float32 [L, C]"""
    model_fingerprint: str

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"model_fingerprint": self.model_fingerprint}
        (folder / MEANS_FILE).write_bytes(save({"key_means": self.means.cpu().contiguous()}, metadata))

    @classmethod
    def load(cls, folder: Path, model_fingerprint: str) -> Self:
        """Raises KeyMeansError unless the folder holds means of this model."""
        path = folder / MEANS_FILE
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("model_fingerprint", "?")
                means = file.get_tensor("key_means")
        except FileNotFoundError as error:
            raise KeyMeansError(f"no {MEANS_FILE} in {folder}: make it with `aquifer calibrate`") from error
        except SafetensorError as error:
            raise KeyMeansError(f"{path} is damaged: {error}") from error
        if found != model_fingerprint:
            raise KeyMeansError(f"{path} belongs to model {found}, this is {model_fingerprint}")
        return cls(means, found)


@dataclass(frozen=True)
class EncodedTokens:
    """One layer of T tokens. codes: uint8 [T, C/4], scales: float16 [T, C/G]: the landmarks.
    rows: uint8 [T, H, row bytes]."""

    codes: Tensor
    scales: Tensor
    rows: Tensor


class TokenCodec:
    """Encodes, ranks and decodes single tokens of caches of one geometry."""

    def __init__(self, spec: KVSpec, key_means: Tensor | None, device: torch.device) -> None:
        """key_means: float32 [L, C]; None: zeros, which costs recall.

        Raises ValueError for means of another geometry and for heads that are not whole units of 8 values.
        """
        self.spec = spec
        self.group = hadamard_group(spec.head_dim)
        shape = (spec.num_layers, spec.channels)
        means = torch.zeros(shape) if key_means is None else key_means
        if means.shape != shape:
            raise ValueError(f"key means of shape {tuple(means.shape)} do not fit a cache of {shape}")
        self.means = means.to(device, torch.float32).view(*shape[:1], spec.num_kv_heads, spec.head_dim)
        # The same signs for every head, so that rows of different heads decode side by side.
        self.signs = random_signs(spec.head_dim, _SIGNS_SEED).to(device)
        self.landmark_quantizer = load_quantizer(LANDMARK_BITS, device)
        self.row_quantizer = load_quantizer(ROW_BITS, device)
        self._higgs_encode = _encoder_for(device)
        self._code_bytes = self.row_quantizer.code_bytes(spec.head_dim)
        self._scale_bytes = spec.head_dim // self.group * SCALE_BYTES

    @property
    def landmark_shapes(self) -> tuple[int, int]:
        """Bytes of codes and number of scales of one token and layer, all heads."""
        return self.landmark_quantizer.code_bytes(self.spec.channels), self.spec.channels // self.group

    @property
    def landmark_bytes(self) -> int:
        """Device bytes of one token, all layers."""
        codes, scales = self.landmark_shapes
        return self.spec.num_layers * (codes + scales * SCALE_BYTES)

    @property
    def row_shapes(self) -> tuple[int, int]:
        """Bytes of codes and of scales of one token and head: as much for its key as for its value."""
        return self._code_bytes, self._scale_bytes

    @property
    def rows_per_slot(self) -> int:
        """Rows whose codes take the room of the KV of one token and head."""
        return self.spec.head_dim * self.spec.dtype.itemsize // self._code_bytes

    @property
    def row_bytes(self) -> int:
        """Host bytes of one token, head and layer: its key and its value."""
        return 2 * (self._code_bytes + self._scale_bytes)

    def encode(self, layer: int, keys: Tensor, values: Tensor) -> EncodedTokens:
        """keys (after RoPE), values: [T, H, D], any float dtype."""
        centred = self._rotate(keys.float() - self.means[layer])
        codes, scales = self._higgs_encode(centred.flatten(1), self.landmark_quantizer, self.group)
        halves = [self._encode_rows(rows) for rows in (centred, self._rotate(values.float()))]
        (key_codes, key_scales), (value_codes, value_scales) = halves
        rows = torch.cat((key_codes, value_codes, key_scales, value_scales), dim=2)
        return EncodedTokens(codes, scales, rows)

    def score(self, queries: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """Estimated attention scores of one query token, as `score_landmarks` returns them.

        queries: [Hq, D] after RoPE; codes, scales: of the layer's landmarks.
        """
        return score_landmarks(self._rotate(queries.float()), codes, scales, self.landmark_quantizer)

    def decode_rows(self, layer: int, heads: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE) and values, float32 [N, D] each, from rows uint8 [N, row bytes] of these heads.

        heads: int64 [N].
        """
        sizes = [self._code_bytes, self._code_bytes, self._scale_bytes, self._scale_bytes]
        key_codes, value_codes, key_scales, value_scales = rows.split(sizes, dim=1)
        keys = self._decode_rows(key_codes, key_scales) + self.means[layer].index_select(0, heads)
        return keys, self._decode_rows(value_codes, value_scales)

    def _rotate(self, x: Tensor) -> Tensor:
        return hadamard(x * self.signs, self.group)

    def _encode_rows(self, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales as bytes, [T, H, ...], of rotated rows [T, H, D]."""
        tokens, heads, _ = rotated.shape
        codes, scales = self._higgs_encode(rotated.flatten(1), self.row_quantizer, self.group)
        return codes.view(tokens, heads, -1), scales.view(tokens, heads, -1).view(torch.uint8)

    def _decode_rows(self, codes: Tensor, scale_bytes: Tensor) -> Tensor:
        base = torch.zeros(len(codes), self.spec.head_dim, device=codes.device)
        scales = scale_bytes.contiguous().view(torch.float16)
        higgs_decode_add(base, codes.contiguous(), scales, self.row_quantizer, out=base)
        return hadamard(base, self.group) * self.signs


def _encoder_for(device: torch.device) -> Callable[[Tensor, Quantizer, int], tuple[Tensor, Tensor]]:
    """The kernel on a CUDA device, else the plain operation. The last bit of a scale may differ, and it
    matters to nobody: what is encoded here is decoded in the same process."""
    if device.type != "cuda":
        return higgs_encode
    from aquifer.kernels.triton.higgs import higgs_encode as kernel  # Triton is optional

    return kernel
