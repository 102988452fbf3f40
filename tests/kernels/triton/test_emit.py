import pytest
import torch
from kernel_inputs import normal, rotated_state
from torch import Tensor

from aquifer.kernels.hadamard import Rotation
from aquifer.kernels.rope import apply_rope
from aquifer.kernels.triton.emit import emit

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2
UNTOUCHED = 7.0


def expected(
    rotated: Tensor, rotation: Rotation, slots: Tensor, pages: Tensor, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    heads, _, head_dim = pages.shape
    rows = rotation.unrotate(rotated.float()).view(len(rotated), heads, head_dim)
    if rope is not None:
        rows = apply_rope(rows, *(t.float() for t in rope))
    wanted = pages.clone()
    wanted[:, slots[slots >= 0].long()] = rows[slots >= 0].transpose(0, 1).to(pages.dtype)
    return wanted


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    [(1, 1, 16), (7, 3, 32), (257, 2, 64), (7, 4, 64), (9, 4, 128), (2, 8, 128), (3, 16, 128)],
)
def test_emitted_rows_equal_their_twins(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    channels = heads * head_dim
    rotation, state, rope = rotated_state(tokens, heads, head_dim, dtype, device)
    slots = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(1))[:tokens].to(device)
    slots[1::4] = -1
    pages = torch.full((2, heads, 2 * tokens, head_dim), UNTOUCHED, dtype=dtype, device=device)
    keys, values = state.split(channels, dim=1)
    wanted = (
        expected(keys, rotation, slots, pages[0], rope),
        expected(values, rotation, slots, pages[1], None),
    )
    emit(state, rotation.signs, rotation.group, rope, slots, *pages)
    for found, expectation in zip(pages, wanted, strict=True):
        torch.testing.assert_close(found, expectation, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert launched == ["_emit"]


@pytest.mark.parametrize("block_tokens", [1, 16])
def test_any_block_size_gives_the_same(block_tokens: int, device: torch.device, launched: list[str]) -> None:
    rotation = Rotation.of(256, 3, device)
    state = normal(37, 512, device=device)
    angles = normal(37, 64, device=device)
    rope = angles.cos(), angles.sin()
    pages = torch.full((2, 4, 64, 64), UNTOUCHED, device=device)
    slots = torch.arange(20, 57, dtype=torch.int32, device=device)
    wanted = expected(state[:, :256], rotation, slots, pages[0], rope)
    emit(state, rotation.signs, 256, rope, slots, *pages, block_tokens=block_tokens)
    torch.testing.assert_close(pages[0], wanted, atol=1e-5, rtol=1e-5)
    assert launched == ["_emit"]


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    state, signs = normal(5, 256, device=device), torch.ones(128, device=device)
    slots, pages = torch.arange(5, device=device), torch.zeros(2, 2, 9, 64, device=device)
    rope = (normal(5, 64, device=device),) * 2
    with pytest.raises(ValueError, match="head_dim is 64; needed: a power of two from 16 to 32"):
        emit(state, signs, 32, rope, slots, *pages)
    with pytest.raises(ValueError, match="slots is"):
        emit(state, signs, 128, rope, slots[1:], *pages)
    with pytest.raises(ValueError, match="state is"):
        emit(state[:, 1:], signs, 128, rope, slots, *pages)
    with pytest.raises(ValueError, match="cos is"):
        emit(state, signs, 128, (signs, signs), slots, *pages)
    with pytest.raises(ValueError, match="values is"):
        emit(state, signs, 128, rope, slots, pages[0], pages[1].half())
