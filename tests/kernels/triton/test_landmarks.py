import pytest
import torch
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels.hadamard import hadamard, random_signs
from aquifer.kernels.higgs import higgs_encode
from aquifer.kernels.landmarks import score_landmarks_ref
from aquifer.kernels.triton.landmarks import SCORE, score_landmarks
from aquifer.kernels.triton.lanes import NOBODY, Lane

# What numpy says where the interpreter takes the logarithm of an empty block, which is -inf as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")

TOLERANCE = 0.03
"""Scores are of order 1; every coordinate of a landmark is rounded to 8 bits."""

LAUNCHED = ["_prepare", SCORE.__name__]


def landmarks(slots: int, heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    keys = torch.randn(slots, heads * head_dim, generator=torch.Generator().manual_seed(slots + heads))
    codes, scales = higgs_encode(keys.to(device), load_quantizer(2, device), head_dim)
    return codes, scales


def lane(pages: list[int], num_q_heads: int, device: torch.device) -> Lane:
    return Lane(pages, [], [], layers=1, sets=1, num_q_heads=num_q_heads, wanted=1, cells=1, device=device)


def table(lanes: list[Lane | None], device: torch.device) -> Tensor:
    return torch.tensor([one.row(1, 1) if one else NOBODY for one in lanes], device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "group", "head_dim", "first"),
    [(1, 1, 64, 0), (2, 3, 64, 4), (1, 6, 64, 4), (1, 8, 128, 4), (2, 4, 128, 4), (1, 2, 256, 4)],
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

    assert launched == LAUNCHED
    for request in (0, 2):
        found = lanes[request].scores
        slots = torch.cat([torch.arange(256) + 256 * page for page in lanes[request].index_pages.tolist()])
        rotated = hadamard(queries[request].float() * signs, head_dim)
        expected = score_landmarks_ref(rotated, codes[slots], scales[slots], grid)
        torch.testing.assert_close(
            found[:, first:].double(), expected[:, first:], atol=TOLERANCE, rtol=TOLERANCE
        )
        # Rounding is noise of one step per channel: small against the spread of the scores.
        error = found[:, first:].double() - expected[:, first:]
        assert error.square().mean() < 1e-4 * expected[:, first:].var()
        whole = expected[:, first:].logsumexp(dim=1)
        torch.testing.assert_close(lse[request].double().logsumexp(dim=1), whole, atol=5e-3, rtol=0)


def test_every_part_has_the_log_sum_exp_of_its_own_pages_without_sinks(
    device: torch.device, launched: list[str]
) -> None:
    """More parts than some requests have pages; one lane has nothing but sinks to score."""
    grid, signs, first = load_quantizer(2, device).grid, torch.ones(64, device=device), 4
    codes, scales = landmarks(5 * 256, 2, 64, device)
    # Shares of attention as sharp as they get: an error of the sum would not go unnoticed in the largest.
    queries = 8 * torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2)).to(device)
    lanes = [lane([0, 3, 1, 4, 2], 4, device), None, lane([2, 0], 4, device)]
    lse = score_landmarks(queries, signs, codes, scales, grid, table(lanes, device), first=first, parts=3)
    for request in (0, 2):
        scores = lanes[request].scores.double()
        scores[:, :first] = -torch.inf
        pages = scores.unflatten(1, (-1, 256)).logsumexp(2)
        for part in range(3):
            own = pages[:, part::3].logsumexp(1)  # -inf where there are none
            torch.testing.assert_close(lse[request, :, part].double(), own, atol=1e-4, rtol=1e-5)
    assert launched == LAUNCHED


def test_landmarks_inside_wider_rows_and_other_parts_give_the_same(
    device: torch.device, launched: list[str]
) -> None:
    grid, signs = load_quantizer(2, device).grid, torch.ones(64, device=device)
    codes, scales = landmarks(512, 2, 64, device)
    wide_codes, wide_scales = (torch.cat((x, x.flip(0)), dim=1)[:, : x.shape[1]] for x in (codes, scales))
    queries = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).to(device)
    one, other = (lane([1, 0], 4, device) for _ in range(2))
    plain = score_landmarks(queries, signs, codes, scales, grid, table([one], device), parts=1)
    wide = wide_codes, wide_scales, grid, table([other], device)
    lse = score_landmarks(queries, signs, *wide, parts=7)
    torch.testing.assert_close(other.scores, one.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.logsumexp(2), plain.logsumexp(2), atol=1e-5, rtol=1e-5)
    assert launched == LAUNCHED * 2


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
    with pytest.raises(ValueError, match="3 query heads"):
        score_landmarks(queries[:, :3], signs, codes, scales, grid, lanes)
