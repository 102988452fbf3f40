import pytest
import torch

from aquifer.kernels.hadamard import (
    Rotation,
    hadamard,
    hadamard_group,
    hadamard_matrix,
    hadamard_ref,
    random_signs,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("group", [1, 2, 8, 32, 256, 512, 2048])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_the_fast_transform_equals_the_whole_matrix(group: int, tokens: int) -> None:
    x = torch.randn(tokens, 3 * group, generator=torch.Generator().manual_seed(group))
    torch.testing.assert_close(hadamard(x, group).double(), hadamard_ref(x, group), atol=2e-6, rtol=1e-5)


def test_the_matrix_is_orthonormal_and_starts_with_a_constant_row() -> None:
    matrix = hadamard_matrix(64, CPU, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64))
    assert torch.equal(matrix[0], torch.full((64,), 1 / 8, dtype=torch.float64))


@pytest.mark.parametrize("channels", [96, 256, 1536])
def test_unrotating_undoes_rotating(channels: int) -> None:
    rotation = Rotation.of(channels, seed=3, device=CPU)
    x = torch.randn(5, channels)
    rotated = rotation.rotate(x)
    assert not torch.allclose(rotated, x, atol=0.1)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotation.unrotate(rotated), x)
    both = torch.cat((rotated, 2 * rotated), dim=1)
    torch.testing.assert_close(rotation.unrotate(both), torch.cat((x, 2 * x), dim=1))


def test_the_group_is_the_largest_power_of_two_in_the_channels() -> None:
    assert [hadamard_group(c) for c in (256, 1024, 1536, 96, 7)] == [256, 1024, 512, 32, 1]


def test_signs_are_fixed_by_their_seed() -> None:
    """Stored segments depend on them. Values: SplitMix64 seeded with 0 starts e220a8397b1dcdaf,
    6e789e6aa1b965f4, 06c45d188009454f, f88bb8a8724c81ec, 1b39896a51a8749b."""
    assert random_signs(5, seed=0).tolist() == [-1, 1, -1, 1, -1]
    many = random_signs(4096, seed=1)
    assert abs(many.mean().item()) < 0.05 and set(many.tolist()) == {-1.0, 1.0}


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_matrix(12, CPU, torch.float32)
    with pytest.raises(ValueError, match="groups of 64"):
        hadamard(torch.zeros(2, 96), 64)
