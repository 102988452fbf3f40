"""What launchers ask of their arguments: a kernel would read past a wrong one without a word."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)


def expect(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: torch.dtype | Sequence[torch.dtype]
) -> None:
    """Raise ValueError unless the tensor has this shape (None: any size), one of these dtypes, and values
    that lie side by side along the last dimension."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    fits = tensor.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in allowed:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; needed: {' or '.join(map(str, allowed))} "
            f"[{', '.join('*' if size is None else str(size) for size in shape)}]"
        )
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; needed: 1")


def expect_power_of_two(name: str, value: int, smallest: int, largest: int) -> None:
    """Raise ValueError unless smallest <= value <= largest, in powers of two."""
    if not smallest <= value <= largest or value & (value - 1):
        raise ValueError(f"{name} is {value}; needed: a power of two from {smallest} to {largest}")
