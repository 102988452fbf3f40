import pytest
import torch
from torch import Tensor

from aquifer.kernels.landmarks import select_tokens_ref
from aquifer.kernels.triton.lanes import NOBODY, Lane
from aquifer.kernels.triton.select import select_tokens

FIRST = 4
NEVER = 65535


class Request:
    """Scores of one request, and the lane that they lie in."""

    def __init__(self, pages: int, heads: int, sets: int, count: int, device: torch.device) -> None:
        self.count, self.tokens = count, 256 * pages
        self.lane = Lane(
            range(pages), [], [], layers=1, sets=sets, num_q_heads=heads, wanted=count, cells=1, device=device
        )
        generator = torch.Generator().manual_seed(pages)
        self.scores = 4 * torch.randn(heads, self.tokens, generator=generator).to(device)

    def partial_lse(self, parts: int) -> Tensor:
        """[Hq, parts]; the last part is empty, as it is where a request has few tokens. Scores are put where
        the kernels find them, as they last for one choice."""
        self.scores[:, :FIRST] = -torch.inf
        self.lane.scores.copy_(self.scores)
        chunks = self.scores.chunk(parts - 1, dim=1)
        lse = torch.stack([chunk.logsumexp(dim=1) for chunk in chunks], dim=1)
        return torch.nn.functional.pad(lse, (0, parts - lse.shape[1]), value=-torch.inf)

    def check(self) -> None:
        """Chosen are the first tokens of the smallest ranks, and these are those of the scores."""
        chosen, sets = self.lane.chosen, len(self.lane.chosen)
        share = torch.log_softmax(self.scores.double(), dim=1)
        best = torch.stack([own.amax(0) for own in share.chunk(sets)])
        ranks = self.lane.keys[:, : self.tokens].int() & NEVER
        assert (ranks[:, :FIRST] == NEVER).all()
        exact = (-512 * best[:, FIRST:]).clamp(0, NEVER - 1)
        assert ((ranks[:, FIRST:] - exact).abs() <= 1.01).all()
        expected = ranks.sort(dim=1, stable=True).indices[:, : self.count].sort(dim=1).values
        assert torch.equal(chosen, expected.int())


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
    assert launched == ["_rank", "_collect", "_decide"]
    for request in requests:
        request.check()
        # Ranks are rounded, so the choice may differ where the limit lies.
        expected = select_tokens_ref(request.scores, sets, request.count, shared=sets == 1)
        chosen = request.lane.chosen.tolist()
        overlap = [len(set(a) & set(b)) for a, b in zip(chosen, expected.tolist(), strict=True)]
        assert min(overlap) >= 0.98 * request.count


@pytest.mark.parametrize("spread", [0.0, 0.01, 30.0, 300.0])
@pytest.mark.parametrize("count", [1, 70, 1000])
def test_however_far_apart_scores_lie_the_limit_is_found(
    count: int, spread: float, device: torch.device, launched: list[str]
) -> None:
    """Ranks that all fall into one bin, that share bins of the finer histogram, that end at the last one."""
    request = Request(17, 2, 2, count, device)
    request.scores *= spread / 4
    lanes = torch.tensor([request.lane.row(1, 1)], device=device)
    select_tokens(lanes, request.partial_lse(3)[None], 2, first=FIRST, chunks=4)
    request.check()
    assert launched


def test_many_heads_that_share_a_set_and_a_peak(device: torch.device, launched: list[str]) -> None:
    request = Request(9, 32, 1, 100, device)
    request.scores[:, -1] = 90.0
    lanes = torch.tensor([request.lane.row(1, 1)], device=device)
    select_tokens(lanes, request.partial_lse(3)[None], 1, first=FIRST, chunks=3)
    request.check()
    assert request.lane.chosen[0, -1] == request.tokens - 1
    assert launched


def test_of_tokens_with_one_rank_the_first_are_chosen(device: torch.device, launched: list[str]) -> None:
    request = Request(4, 2, 2, 300, device)
    request.scores[:, FIRST:] = 0.0
    request.scores[:, 700:800] = 1.0
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
