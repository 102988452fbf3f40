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
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    if fits:
        for want, have in zip(shape, sizes, strict=True):  # a launch takes microseconds: all() is too slow
            fits &= want is None or want == have
    if not fits or tensor.dtype not in allowed:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; needed: {' or '.join(map(str, allowed))} "
            f"[{', '.join('*' if size is None else str(size) for size in shape)}]"
        )
    if tensor.stride(-1) != 1 and tensor.numel():
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; needed: 1")


def expect_pool(
    keys: Tensor,
    values: Tensor,
    heads: int | None,
    head_dim: int | None,
    dtypes: torch.dtype | Sequence[torch.dtype],
) -> None:
    """Raise ValueError unless keys and values [H, slots, D] are alike, and the slots of a head side by side,
    as in one layer of a pool of pages."""
    expect("keys", keys, (heads, None, head_dim), dtypes)
    expect("values", values, keys.shape, keys.dtype)
    for name, half in (("keys", keys), ("values", values)):
        if half.stride()[:2] != (keys.stride(0), keys.shape[2]):
            raise ValueError(f"{name} has strides {half.stride()}; needed: those of a pool's layer")


def expect_power_of_two(name: str, value: int, smallest: int, largest: int) -> None:
    """Raise ValueError unless smallest <= value <= largest, in powers of two."""
    if not smallest <= value <= largest or value & (value - 1):
        raise ValueError(f"{name} is {value}; needed: a power of two from {smallest} to {largest}")
