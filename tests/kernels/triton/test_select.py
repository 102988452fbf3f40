import pytest
import torch
from torch import Tensor

from aquifer.kernels.landmarks import select_tokens_ref
from aquifer.kernels.triton.lanes import NOBODY, Lane
from aquifer.kernels.triton.select import select_tokens

FIRST = 4


class Request:
    """Scores of one request, and the lane that they lie in."""

    def __init__(self, pages: int, heads: int, sets: int, count: int, device: torch.device) -> None:
        self.count = count
        self.lane = Lane(
            range(pages), [], [], layers=1, sets=sets, num_q_heads=heads, wanted=count, slots=1, device=device
        )
        scores = 4 * torch.randn(heads, 256 * pages, generator=torch.Generator().manual_seed(pages))
        scores[:, :FIRST] = -torch.inf
        self.lane.scores.copy_(scores)

    def partial_lse(self, parts: int) -> Tensor:
        """[Hq, parts]; the last part is empty, as it is where a request has few tokens."""
        chunks = self.lane.scores.chunk(parts - 1, dim=1)
        lse = torch.stack([chunk.logsumexp(dim=1) for chunk in chunks], dim=1)
        return torch.nn.functional.pad(lse, (0, parts - lse.shape[1]), value=-torch.inf)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(("group", "block_tokens"), [(1, 1024), (3, 256), (4, 128)])
def test_the_best_tokens_are_chosen_in_ascending_order(
    group: int, block_tokens: int, sets: int, device: torch.device, launched: list[str]
) -> None:
    heads = 2 * group
    requests = [Request(pages, heads, sets, count, device) for pages, count in ((9, 31), (1, 252), (5, 400))]
    rows = [requests[0].lane.row(1, 1), NOBODY, *(request.lane.row(1, 1) for request in requests[1:])]
    lse = [request.partial_lse(5) for request in requests]
    partial = torch.stack((lse[0], lse[0], *lse[1:]))
    lanes = torch.tensor(rows, device=device)
    select_tokens(lanes, partial, sets, first=FIRST, block_tokens=block_tokens, chunks=3)
    assert launched == ["_rank", "_refine", "_choose"]
    for request in requests:
        chosen = request.lane.chosen
        assert (chosen[:, 1:] > chosen[:, :-1]).all()
        assert chosen.min() >= FIRST
        # Ranks are rounded, so where the limit lies the choice may differ, by as little as that.
        share = torch.log_softmax(request.lane.scores.double(), dim=1)
        best = torch.stack([own.amax(0) for own in share.chunk(sets)])
        expected = select_tokens_ref(request.lane.scores, sets, request.count, shared=sets == 1)
        worst = best.gather(1, chosen.long()).amin(1)
        assert (worst >= best.gather(1, expected).amin(1) - 1 / 512 - 1e-5).all()
        overlap = [len(set(a) & set(b)) for a, b in zip(chosen.tolist(), expected.tolist(), strict=True)]
        assert min(overlap) >= 0.98 * request.count


def test_of_tokens_with_one_rank_the_first_are_chosen(device: torch.device, launched: list[str]) -> None:
    request = Request(4, 2, 2, 300, device)
    request.lane.scores[:, FIRST:] = 0.0
    request.lane.scores[:, 700:800] = 1.0
    lanes = torch.tensor([request.lane.row(1, 1)], device=device)
    select_tokens(lanes, request.partial_lse(3)[None], 2, first=FIRST, chunks=2)
    expected = [*range(FIRST, FIRST + 200), *range(700, 800)]
    assert request.lane.chosen.tolist() == [expected, expected]
    assert launched


def test_a_choice_does_not_depend_on_the_rest_of_the_batch(device: torch.device, launched: list[str]) -> None:
    request, other = Request(3, 4, 2, 50, device), Request(7, 4, 2, 90, device)
    alone = torch.tensor([request.lane.row(1, 1)], device=device)
    select_tokens(alone, request.partial_lse(5)[None], 2, first=FIRST, chunks=4)
    before = request.lane.chosen.clone()
    request.lane.chosen.fill_(-1)
    both = torch.tensor([other.lane.row(1, 1), request.lane.row(1, 1)], device=device)
    partial = torch.stack([other.partial_lse(5), request.partial_lse(5)])
    select_tokens(both, partial, 2, first=FIRST, chunks=2)
    assert torch.equal(request.lane.chosen, before)
    assert launched


def test_heads_that_do_not_divide_into_sets_are_refused(device: torch.device) -> None:
    lanes = torch.tensor([NOBODY], device=device)
    with pytest.raises(ValueError, match="4 query heads do not divide into 3 sets"):
        select_tokens(lanes, torch.zeros(1, 4, 2, device=device), 3)
