"""Which implementation of an operation runs: plain PyTorch, or the Triton kernel beside it.

Decided once, when a model is loaded; nothing asks again in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.kernels import attention, greedy, norms, rope


@dataclass(frozen=True)
class Backend:
    """The operations of a decoder that exist twice; see the plain modules for what each does.

    fuses: whether layers should be computed with these operations rather than the model's own modules, and
        steps be recorded as graphs.
    """

    fuses: bool
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate_and_store: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]
    ]
    attend_pages: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    most_likely: Callable[[Tensor, Tensor, Tensor], None]


PLAIN = Backend(
    fuses=False,
    rms_norm=norms.rms_norm,
    add_rms_norm=norms.add_rms_norm,
    swiglu=norms.swiglu,
    rotate_and_store=rope.rotate_and_store,
    attend_pages=attention.attend_pages,
    most_likely=greedy.most_likely,
)


def backend_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The kernels on a CUDA device, if they know the geometry; else the plain operations."""
    known = dtype in (torch.float32, torch.bfloat16, torch.float16) and head_dim in (16, 32, 64, 128, 256)
    return triton_backend() if device.type == "cuda" and known else PLAIN


def triton_backend() -> Backend:
    """The kernels. Imports Triton, which must be there."""
    from aquifer.kernels.triton import attention as paged
    from aquifer.kernels.triton import greedy as best
    from aquifer.kernels.triton import norms as fused
    from aquifer.kernels.triton import rope as rotation

    return Backend(
        fuses=True,
        rms_norm=fused.rms_norm,
        add_rms_norm=fused.add_rms_norm,
        swiglu=fused.swiglu,
        rotate_and_store=rotation.rotate_and_store,
        attend_pages=paged.attend_pages,
        most_likely=best.most_likely,
    )
