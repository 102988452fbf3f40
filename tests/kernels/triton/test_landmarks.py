import pytest
import torch
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels.hadamard import hadamard, random_signs
from aquifer.kernels.higgs import higgs_encode
from aquifer.kernels.landmarks import score_landmarks_ref
from aquifer.kernels.triton.landmarks import score_landmarks
from aquifer.kernels.triton.lanes import NOBODY, Lane

# What numpy says where the interpreter takes the logarithm of an empty block, which is -inf as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")

TOLERANCE = 0.05
"""Scores are of order 1; every product of four coordinates is rounded to 8 bits."""


def landmarks(slots: int, heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    keys = torch.randn(slots, heads * head_dim, generator=torch.Generator().manual_seed(slots + heads))
    codes, scales = higgs_encode(keys.to(device), load_quantizer(2, device), head_dim)
    return codes, scales


def lane(pages: list[int], num_q_heads: int, device: torch.device) -> Lane:
    return Lane(pages, [], [], layers=1, sets=1, num_q_heads=num_q_heads, wanted=1, slots=1, device=device)


def table(lanes: list[Lane | None], device: torch.device) -> Tensor:
    return torch.tensor([one.row(1, 1) if one else NOBODY for one in lanes], device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "group", "head_dim", "first"), [(1, 1, 64, 0), (2, 3, 64, 4), (1, 6, 64, 4), (1, 4, 128, 4)]
)
def test_scores_of_many_requests_equal_their_twin(
    heads: int,
    group: int,
    head_dim: int,
    first: int,
    dtype: torch.dtype,
    device: torch.device,
    launched: list[str],
) -> None:
    grid, signs = load_quantizer(2, device).grid, random_signs(head_dim, 3).to(device)
    codes, scales = landmarks(6 * 256, heads, head_dim, device)
    generator = torch.Generator().manual_seed(9)
    queries = torch.randn(3, heads * group, head_dim, generator=generator).to(device, dtype)
    lanes = [lane([3], heads * group, device), None, lane([4, 1, 5], heads * group, device)]

    lse = score_landmarks(queries, signs, codes, scales, grid, table(lanes, device), first=first, parts=2)

    assert launched == ["_tabulate", "_score"]
    for request in (0, 2):
        found = lanes[request].scores
        slots = torch.cat([torch.arange(256) + 256 * page for page in lanes[request].index_pages.tolist()])
        rotated = hadamard(queries[request].float() * signs, head_dim)
        expected = score_landmarks_ref(rotated, codes[slots], scales[slots], grid)
        torch.testing.assert_close(
            found[:, first:].double(), expected[:, first:], atol=TOLERANCE, rtol=TOLERANCE
        )
        whole = expected[:, first:].logsumexp(dim=1)
        found_lse = lse[request].double().logsumexp(dim=1)
        torch.testing.assert_close(found_lse, whole, atol=TOLERANCE, rtol=TOLERANCE)
        # Rounding is noise of one step of a table per product: small against the spread of the scores.
        error = found[:, first:].double() - expected[:, first:]
        assert error.square().mean() < 1e-3 * expected[:, first:].var()


def test_landmarks_inside_wider_rows_and_other_block_sizes_give_the_same(
    device: torch.device, launched: list[str]
) -> None:
    grid, signs = load_quantizer(2, device).grid, torch.ones(64, device=device)
    codes, scales = landmarks(512, 2, 64, device)
    wide_codes = torch.cat((codes, codes.flip(0)), dim=1)[:, : codes.shape[1]]
    queries = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).to(device)
    one, other = (lane([1, 0], 4, device) for _ in range(2))
    plain = score_landmarks(queries, signs, codes, scales, grid, table([one], device), parts=1)
    lse = score_landmarks(
        queries, signs, wide_codes, scales, grid, table([other], device), parts=7, block_tokens=32
    )
    torch.testing.assert_close(other.scores, one.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.logsumexp(2), plain.logsumexp(2), atol=1e-5, rtol=1e-5)
    assert launched == ["_tabulate", "_score"] * 2


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    grid, signs = load_quantizer(2, device).grid, torch.ones(64, device=device)
    codes, scales = landmarks(256, 2, 64, device)
    lanes = table([None], device)
    queries = torch.zeros(1, 4, 64, device=device)
    with pytest.raises(ValueError, match="codes is"):
        score_landmarks(queries, signs, codes[:, 1:], scales, grid, lanes)
    with pytest.raises(ValueError, match="grid is"):
        score_landmarks(queries, signs, codes, scales, load_quantizer(4, device).grid, lanes)
    with pytest.raises(ValueError, match="lanes is"):
        score_landmarks(queries, signs, codes, scales, grid, lanes[:, 1:])
    with pytest.raises(ValueError, match="block_tokens is 48"):
        score_landmarks(queries, signs, codes, scales, grid, lanes, block_tokens=48)
    with pytest.raises(ValueError, match="3 query heads"):
        score_landmarks(queries[:, :3], signs, codes, scales, grid, lanes)
