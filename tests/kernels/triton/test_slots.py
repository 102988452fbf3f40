from collections import OrderedDict

import pytest
import torch
from kernel_inputs import a_lane

from aquifer.kernels.triton.lanes import NOBODY, lay_out
from aquifer.kernels.triton.slots import find_rows

SINKS = 4


class Books:
    """What find_rows keeps, in plain Python: one set of one layer."""

    def __init__(self, slots: int) -> None:
        self.slot_of: dict[int, int] = {}
        self.used = OrderedDict.fromkeys(range(slots), -1)

    def find(self, chosen: list[int], step: int) -> tuple[list[int], list[int]]:
        """Slots of the chosen tokens, and those that are missing."""
        missing = [token for token in chosen if token not in self.slot_of]
        for token in chosen:
            if token in self.slot_of:
                self.used[self.slot_of[token]] = step
        age = {slot: min(step - used, 255) for slot, used in self.used.items()}
        oldest = sorted(age, key=lambda slot: (-age[slot], slot))[: len(missing)]
        token_in = {slot: token for token, slot in self.slot_of.items()}
        for token, slot in zip(missing, sorted(oldest), strict=True):
            self.slot_of.pop(token_in.get(slot, -1), None)
            self.slot_of[token] = slot
            self.used[slot] = step
        return [self.slot_of[token] for token in chosen], missing


@pytest.mark.parametrize(("sets", "block", "chunks"), [(1, 512, 1), (2, 16, 2)])
def test_random_steps_keep_the_books_that_plain_code_keeps(
    sets: int, block: int, chunks: int, device: torch.device, launched: list[str]
) -> None:
    lane, other = a_lane(sets, 20, device, slots=50), a_lane(sets, 5, device, slots=7)
    books = {(one, own): Books(one.slots) for one in (lane, other) for own in range(sets)}
    lists = torch.zeros(3, sets, 64, dtype=torch.int32, device=device)
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(sets)
    fetched = 0
    # Steps far apart make slots so old that their ages are no longer told apart.
    steps = [*range(1, 6), *range(300, 304), 700]
    for step in steps:
        for one in (lane, other):
            # A few tokens more than there are slots, so that some stay and some go.
            picks = [torch.randperm(60, generator=generator)[: one.wanted].sort().values for _ in range(sets)]
            one.chosen.copy_(SINKS + torch.stack(picks))
        table = torch.tensor([lane.row(step, 3), NOBODY, other.row(step, 3)], device=device)
        num_missing = find_rows(table, 1, lists, counters, sinks=SINKS, block=block, chunks=chunks)
        for number, one in ((0, lane), (2, other)):
            for own in range(sets):
                slots, missing = books[one, own].find(one.chosen[own].tolist(), step)
                assert num_missing[number, own] == len(missing)
                assert one.missing[own, : len(missing)].tolist() == missing
                pooled = [3 * 256 + SINKS + slot for slot in slots]
                assert lists[number, own, SINKS + 3 :][: len(slots)].tolist() == pooled
                targets = [3 * 256 + SINKS + books[one, own].slot_of[token] for token in missing]
                assert one.targets[own, : len(missing)].tolist() == targets
                fetched += len(missing)
    assert num_missing[1].tolist() == [0] * sets
    assert (lane.slot_of[0] == -1).all()  # the other layer has books of its own
    assert counters.tolist() == [len(steps) * sets * (20 + 5), fetched]
    assert set(launched) == {"_look_up", "_count_ages", "_give_slots"}


def test_a_list_begins_with_sinks_and_tail(device: torch.device, launched: list[str]) -> None:
    lane = a_lane(2, 6, device)
    lists = torch.full((2, 2, 300), -1, dtype=torch.int32, device=device)
    lengths = torch.full((2,), -1, dtype=torch.int32, device=device)
    lay_out(torch.tensor([NOBODY, lane.row(1, 258)], device=device), lists, lengths, sinks=SINKS)
    expected = [*range(768, 772), *range(5 * 256, 6 * 256), 256, 257]
    assert lists[1, :, : len(expected)].tolist() == [expected, expected]
    assert (lists[0] == -1).all() and (lists[1, :, len(expected) :] == -1).all()
    assert lengths.tolist() == [0, 4 + 258 + 6]
    assert launched == ["_lay_out"]


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    lanes = torch.tensor([a_lane(1, 5, device).row(1, 1)], device=device)
    lists = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="counters is"):
        find_rows(lanes, 0, lists, torch.zeros(3, dtype=torch.int64, device=device), sinks=SINKS)
