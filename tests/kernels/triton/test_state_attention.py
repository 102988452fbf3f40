import pytest
import torch
from kernel_inputs import normal, rotated_state
from torch import Tensor

from aquifer.kernels.attention import attend_ref
from aquifer.kernels.hadamard import Rotation
from aquifer.kernels.rope import apply_rope
from aquifer.kernels.triton.state_attention import attend_state

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2
KERNELS = ["_score_keys", "_sum_values", "_merge_rotated"]


def expected(
    q: Tensor, state: Tensor, rotation: Rotation, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values as tensors, in float64."""
    channels, head_dim = state.shape[1] // 2, q.shape[1]
    keys, values = (
        rotation.unrotate(half.float()).view(len(state), -1, head_dim) for half in state.split(channels, 1)
    )
    keys = apply_rope(keys, *(table.float() for table in rope))
    out, lse = attend_ref(q[:, None].float(), keys.transpose(0, 1), values.transpose(0, 1))
    return out[:, 0], lse[:, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "per_head"),
    [(1, 1, 16, 1), (7, 3, 32, 2), (130, 2, 64, 3), (9, 4, 128, 7), (70, 8, 128, 4), (5, 6, 64, 1)],
)
def test_attention_to_a_state_equals_its_twin(
    tokens: int,
    heads: int,
    head_dim: int,
    per_head: int,
    dtype: torch.dtype,
    device: torch.device,
    launched: list[str],
) -> None:
    rotation, state, rope = rotated_state(tokens, heads, head_dim, dtype, device)
    q = normal(heads * per_head, head_dim, device=device).to(dtype)
    out, lse = attend_state(q, state, rotation.signs, rotation.group, rope)
    wanted, wanted_lse = expected(q, state, rotation, rope)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, wanted_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert launched == KERNELS


@pytest.mark.parametrize("splits", [1, 2, 3, 64])
def test_any_number_of_splits_gives_the_same(splits: int, device: torch.device, launched: list[str]) -> None:
    rotation = Rotation.of(128, 3, device)
    state, angles = normal(200, 256, device=device), normal(200, 64, device=device)
    rope = angles.cos(), angles.sin()
    # Large queries: the shares of the splits differ by orders of magnitude.
    q = 8 * normal(4, 64, device=device)
    out, lse = attend_state(q, state, rotation.signs, rotation.group, rope, splits=splits)
    wanted, wanted_lse = expected(q, state, rotation, rope)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-4, rtol=1e-4)
    assert launched == KERNELS


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    state, signs, q = (
        normal(5, 256, device=device),
        torch.ones(128, device=device),
        normal(2, 64, device=device),
    )
    rope = (normal(5, 64, device=device),) * 2
    with pytest.raises(ValueError, match="head_dim is 64; needed: a power of two from 16 to 32"):
        attend_state(q, state, signs, 32, rope)
    with pytest.raises(ValueError, match="3 query heads do not fit 128 channels in groups of 128"):
        attend_state(normal(3, 64, device=device), state, signs, 128, rope)
    with pytest.raises(ValueError, match="cos is"):
        attend_state(q, state, signs, 128, (rope[0][1:], rope[1]))
    with pytest.raises(ValueError, match="state is"):
        attend_state(q, state[:, 1:], signs, 128, rope)
