import pytest
import torch
from torch import Tensor

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels.higgs import higgs_encode
from aquifer.kernels.landmarks import score_landmarks_ref, select_tokens_ref
from aquifer.kernels.triton.landmarks import pack_points, rank_tokens, score_landmarks

# What numpy says where the interpreter takes the logarithm of an empty block, which is -inf as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")

TOLERANCE = 2e-3
"""Scores are of order 1; queries and grid points are rounded to float16."""


def landmarks(slots: int, heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    keys = torch.randn(slots, heads * head_dim, generator=torch.Generator().manual_seed(slots + heads))
    codes, scales = higgs_encode(keys.to(device), load_quantizer(2, device), head_dim)
    return codes, scales


@pytest.mark.parametrize(
    ("heads", "group", "head_dim", "first"), [(1, 1, 64, 0), (2, 3, 64, 4), (1, 4, 128, 4)]
)
def test_scores_of_many_requests_equal_their_twin(
    heads: int, group: int, head_dim: int, first: int, device: torch.device, launched: list[str]
) -> None:
    pages = [[3], [0], [4, 1], [2, 0]]
    tokens = [1, 7, 255 + 2, 511]
    grid = load_quantizer(2, device).grid
    codes, scales = landmarks(5 * 256, heads, head_dim, device)
    queries = torch.randn(4, heads * group, head_dim, generator=torch.Generator().manual_seed(9)).to(device)
    tables = torch.tensor([row + [-1] * (2 - len(row)) for row in pages], dtype=torch.int32, device=device)
    lengths = torch.tensor(tokens, dtype=torch.int32, device=device)

    scores, lse = score_landmarks(queries, codes, scales, pack_points(grid), tables, lengths, first=first)

    assert launched == ["_score_block"]
    assert scores.shape == (4, heads * group, 512)
    for request, (own, count) in enumerate(zip(pages, tokens, strict=True)):
        found = scores[request].double()
        assert (found[:, count:] == -torch.inf).all() and (found[:, :first] == -torch.inf).all()
        if count <= first:
            assert (lse[request] == -torch.inf).all()
            continue
        slots = torch.cat([torch.arange(page * 256, page * 256 + 256) for page in own])[first:count]
        slots = slots.to(device)
        expected = score_landmarks_ref(queries[request], codes[slots], scales[slots], grid)
        torch.testing.assert_close(found[:, first:count], expected, atol=TOLERANCE, rtol=TOLERANCE)
        wanted = expected.logsumexp(dim=1)
        torch.testing.assert_close(lse[request].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_landmarks_inside_wider_rows_and_other_block_sizes_give_the_same(
    device: torch.device, launched: list[str]
) -> None:
    points = pack_points(load_quantizer(2, device).grid)
    codes, scales = landmarks(512, 2, 64, device)
    wide_codes = torch.cat((codes, codes.flip(0)), dim=1)[:, : codes.shape[1]]
    queries = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).to(device)
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    length = torch.tensor([400], dtype=torch.int32, device=device)
    plain = score_landmarks(queries, codes, scales, points, table, length)
    blocks = score_landmarks(queries, wide_codes, scales, points, table, length, block_tokens=32)
    for found, expected in zip(blocks, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(launched) == 2


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_the_largest_ranks_are_what_the_twin_selects(
    group: int, shared: bool, device: torch.device, launched: list[str]
) -> None:
    scores = 4 * torch.randn(3, 2 * group, 512, generator=torch.Generator().manual_seed(2)).to(device)
    scores[0, :, 257:] = -torch.inf
    scores[2] = -torch.inf
    ranks = rank_tokens(scores, scores.logsumexp(dim=2), 2, shared=shared)
    assert launched == ["_rank_block"]
    assert ranks.shape == (3, 1 if shared else 2, 512)
    for request in range(2):
        found = ranks[request].topk(31, dim=1).indices.sort(dim=1).values
        assert torch.equal(found, select_tokens_ref(scores[request], 2, 31, shared=shared))
    assert (ranks[0, :, 257:] == -torch.inf).all() and (ranks[2] == -torch.inf).all()


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    points = pack_points(load_quantizer(2, device).grid)
    codes, scales = landmarks(256, 2, 64, device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    length = torch.ones(1, dtype=torch.int32, device=device)
    queries = torch.zeros(1, 4, 64, device=device)
    with pytest.raises(ValueError, match="codes is"):
        score_landmarks(queries, codes[:, 1:], scales, points, table, length)
    with pytest.raises(ValueError, match="grid is"):
        pack_points(load_quantizer(4, device).grid)
    with pytest.raises(ValueError, match="lengths is"):
        score_landmarks(queries, codes, scales, points, table, length.long())
    with pytest.raises(ValueError, match="block_tokens is 48"):
        score_landmarks(queries, codes, scales, points, table, length, block_tokens=48)
    with pytest.raises(ValueError, match="3 query heads"):
        score_landmarks(queries[:, :3], codes, scales, points, table, length)
    with pytest.raises(ValueError, match="do not fit 3 KV heads"):
        rank_tokens(torch.zeros(1, 4, 256, device=device), torch.zeros(1, 4, device=device), 3, shared=True)
