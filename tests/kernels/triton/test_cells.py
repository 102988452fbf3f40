import random
from collections.abc import Sequence

import pytest
import torch
from kernel_inputs import a_lane

from aquifer.kernels.triton.cells import find_rows
from aquifer.kernels.triton.lanes import NOBODY, Lane

SINKS = 4


class Books:
    """What find_rows keeps, in plain Python: one set of one layer."""

    def __init__(self, cells: int) -> None:
        self.cell_of: dict[int, int] = {}
        self.used = [-1] * cells

    def find(self, chosen: list[int], step: int) -> tuple[list[int], list[int]]:
        """Cells of the chosen tokens, and those that are missing."""
        missing = [token for token in chosen if token not in self.cell_of]
        for token in chosen:
            if token in self.cell_of:
                self.used[self.cell_of[token]] = step
        cells, wanted = len(self.used), len(chosen)
        start = step % -(-cells // wanted) * wanted
        window = [(start + place) % cells for place in range(wanted)]
        age = {cell: min(-(-(step - self.used[cell]) // 4), 255) for cell in window}
        oldest = set(sorted(window, key=lambda cell: -age[cell])[: len(missing)])
        token_in = {cell: token for token, cell in self.cell_of.items()}
        for token, cell in zip(missing, (cell for cell in window if cell in oldest), strict=True):
            assert self.used[cell] < step
            self.cell_of.pop(token_in.get(cell, -1), None)
            self.cell_of[token] = cell
            self.used[cell] = step
        return [self.cell_of[token] for token in chosen], missing


def a_long_lane(sets: int, device: torch.device) -> Lane:
    """Chosen tokens and a window of several turns of a program."""
    pages = random.Random(1).sample(range(40), 40)
    return Lane(
        *(pages[:30], [41], pages),
        layers=2,
        sets=sets,
        num_q_heads=sets,
        wanted=4500,
        cells=10000,
        device=device,
    )


def pooled(lane: Lane, cells: list[int], per_slot: int) -> list[int]:
    pages, page_cells = lane.row_pages.tolist(), 256 * per_slot
    places = [SINKS * per_slot + cell for cell in cells]
    return [pages[place // page_cells] * page_cells + place % page_cells for place in places]


# Steps far apart make cells so old that their ages are no longer told apart.
FAR_APART = [*range(1, 6), *range(300, 304), 2000, 2001, 5000]


@pytest.mark.parametrize(
    ("sets", "per_slot", "lengths", "steps"),
    [
        (1, 8, [(20, 50), (5, 7)], FAR_APART),  # a window goes past the last cell
        (2, 4, [(20, 40), (5, 5)], FAR_APART),  # and never does, or is always the same
        (2, 1, [(20, 60), (19, 21)], range(1, 12)),  # every token has a cell, or few cells are free
        (1, 8, [(3, 48), (1, 1)], range(1, 36)),  # 16 windows
        (1, 8, [(4500, 10000)], range(1, 8)),
    ],
)
def test_random_steps_keep_the_books_that_plain_code_keeps(
    sets: int,
    per_slot: int,
    lengths: list[tuple[int, int]],
    steps: Sequence[int],
    device: torch.device,
    launched: list[str],
) -> None:
    lanes = [
        a_lane(sets, wanted, device, cells=cells) if cells < 100 else a_long_lane(sets, device)
        for wanted, cells in lengths
    ]
    books = {(lane, own): Books(lane.cells) for lane in lanes for own in range(sets)}
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(sets)
    chosen = fetched = 0
    for step in steps:
        rows = [NOBODY]
        for late, lane in enumerate(lanes):
            # A few tokens more than there are cells, so that some stay and some go.
            tokens = min(lane.cells * 6 // 5 + 1, 60) if lane.cells < 100 else 7500
            picks = [torch.randperm(tokens, generator=generator)[: lane.wanted] for _ in range(sets)]
            lane.chosen.copy_(SINKS + torch.stack(picks).sort().values)
            rows += [lane.row(step + late, 3), NOBODY]
        table = torch.tensor(rows, device=device)
        num_missing = find_rows(table, 1, sets, counters, sinks=SINKS, per_slot=per_slot)
        for number, lane in enumerate(lanes):
            for own in range(sets):
                book = books[lane, own]
                found, missing = book.find(lane.chosen[own].tolist(), step + number)
                assert num_missing[1 + 2 * number, own] == len(missing)
                assert lane.missing[own, : len(missing)].tolist() == missing
                assert len(set(found)) == lane.wanted
                assert lane.row_cells[own].tolist() == pooled(lane, found, per_slot)
                targets = pooled(lane, [book.cell_of[token] for token in missing], per_slot)
                assert lane.targets[own, : len(missing)].tolist() == targets
                chosen += lane.wanted
                fetched += len(missing)
        assert not num_missing[::2].any()
    assert all((lane.cell_of[0] == -1).all() for lane in lanes)  # the other layer has books of its own
    assert counters.tolist() == [chosen, fetched]
    assert set(launched) == {"_find"}


def test_tokens_with_cells_of_their_own_are_missing_once(device: torch.device, launched: list[str]) -> None:
    sets, per_slot, layer = 2, 4, 1
    lane = a_lane(sets, 50, device, cells=0)
    there: list[set[int]] = [set() for _ in range(sets)]
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(3)
    fetched = 0
    for step in range(1, 6):
        picks = [torch.randperm(200, generator=generator)[:50] for _ in range(sets)]
        lane.chosen.copy_(SINKS + torch.stack(picks).sort().values)
        table = torch.tensor([NOBODY, lane.row(step, 3, loaded=layer)], device=device)
        num_missing = find_rows(table, layer, sets, counters, sinks=SINKS, per_slot=per_slot)
        for own in range(sets):
            chosen = lane.chosen[own].tolist()
            missing = [token for token in chosen if token not in there[own]]
            assert num_missing[:, own].tolist() == [0, len(missing)]
            assert lane.missing[own, : len(missing)].tolist() == missing
            homes = pooled(lane, [token - SINKS for token in missing], per_slot)
            assert lane.targets[own, : len(missing)].tolist() == homes
            there[own] |= set(chosen)
            fetched += len(missing)
    assert (lane.cell_of[0] == -1).all()
    assert counters.tolist() == [5 * 2 * 50, fetched]
    # Once all rows of the layer are loaded, none is missing, whatever was fetched.
    lane.chosen.copy_(500 + torch.arange(50).expand(sets, -1))
    table = torch.tensor([lane.row(6, 3, loaded=layer + 1)], device=device)
    assert not find_rows(table, layer, sets, counters, sinks=SINKS, per_slot=per_slot).any()
    assert counters.tolist() == [6 * 2 * 50, fetched]
    assert set(launched) == {"_find"}


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    lanes = torch.tensor([a_lane(1, 5, device).row(1, 1)], device=device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="counters is"):
        find_rows(lanes, 0, 1, counters, sinks=SINKS, per_slot=4)
    with pytest.raises(ValueError, match="per_slot is 3"):
        find_rows(lanes, 0, 1, counters[:2], sinks=SINKS, per_slot=3)
