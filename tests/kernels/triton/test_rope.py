import pytest
import torch
from torch import Tensor

from aquifer.kernels import rope as plain
from aquifer.kernels.triton.rope import rotate_and_store

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "head_dim"), [(1, 2, 3, 16), (9, 1, 4, 64), (70, 2, 1, 128)]
)
def test_rotated_and_stored_tokens_equal_their_twin(
    tokens: int,
    heads: int,
    group: int,
    head_dim: int,
    index: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    launched: list[str],
) -> None:
    """q, k and v are parts of one product, as in a fused projection; every third token has no slot."""
    sizes = [heads * group, heads, heads]
    product = normal(tokens, sum(sizes) * head_dim, dtype=dtype, device=device)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in product.split([n * head_dim for n in sizes], 1))
    cos, sin = normal(2, tokens, head_dim, dtype=dtype, device=device)
    slots = torch.randperm(256)[:tokens].to(device, index)
    slots[2::3] = -1
    pools = [normal(2, heads, 256, head_dim, dtype=dtype, device=device) for _ in range(2)]
    found = rotate_and_store(q, k, v, cos, sin, slots, *pools[0])
    expected = plain.rotate_and_store(q, k, v, cos, sin, slots.long(), *pools[1])
    for one, other in zip((*found, pools[0]), (*expected, pools[1]), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert launched == ["_rotate_store"]


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    q, k = (torch.zeros(3, heads, 64, device=device) for heads in (4, 2))
    angles, slots = torch.zeros(3, 64, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    pool = torch.zeros(2, 256, 64, device=device)
    with pytest.raises(ValueError, match="slots is"):
        rotate_and_store(q, k, k, angles, angles, slots[:2], pool, pool)
    with pytest.raises(ValueError, match="values is"):
        rotate_and_store(q, k, k, angles, angles, slots, pool, pool.half())
    with pytest.raises(ValueError, match="side by side"):
        rotate_and_store(
            q, k.transpose(0, 1).contiguous().transpose(0, 1), k, angles, angles, slots, pool, pool
        )
