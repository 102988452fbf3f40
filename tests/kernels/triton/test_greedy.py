import pytest
import torch
from torch import Tensor

from aquifer.kernels import greedy as plain
from aquifer.kernels.triton.greedy import most_likely


def outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows, device = len(logits), logits.device
    return torch.full((rows,), -1, dtype=torch.int32, device=device), torch.ones(rows, device=device)


@pytest.mark.parametrize(
    ("rows", "width", "block"), [(1, 1, 16), (1, 128, 128), (3, 1000, 64), (5, 4097, 1024), (0, 9, 16)]
)
def test_the_most_likely_token_equals_its_twin(
    rows: int, width: int, block: int, device: torch.device, launched: list[str]
) -> None:
    logits = 5 * torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(width))
    logits = logits.to(device)[:, :width]  # rows with something between
    found, expected = outputs(logits), outputs(logits)
    most_likely(logits, *found, block=block)
    plain.most_likely(logits, *expected)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    assert launched == ["_find_best", "_join_best"]


def test_of_equal_logits_the_first_counts(device: torch.device, launched: list[str]) -> None:
    """Within a part, in two of them, and where parts are masked out altogether."""
    logits = torch.full((4, 100), float("-inf"))
    for row, best in enumerate([(17, 18), (15, 90), (40,), (0, 99)]):
        logits[row, list(best)] = 3.0
    logits = logits.to(device)
    for choose in (plain.most_likely, lambda *args: most_likely(*args, block=16)):
        ids, logprobs = outputs(logits)
        choose(logits, ids, logprobs)
        assert ids.tolist() == [17, 15, 40, 0]
        assert logprobs.exp().tolist() == pytest.approx([0.5, 0.5, 1.0, 0.5])


def test_a_token_of_rows_that_are_not_numbers_exists(device: torch.device, launched: list[str]) -> None:
    logits = torch.full((2, 100), float("nan"), device=device)
    logits[1] = float("-inf")
    ids, logprobs = outputs(logits)
    most_likely(logits, ids, logprobs, block=64)
    assert ids.min() >= 0 and ids.max() < 100
    assert logprobs.isnan().all()


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    logits = torch.zeros(2, 64, device=device)
    ids, logprobs = outputs(logits)
    with pytest.raises(ValueError, match="logits is"):
        most_likely(logits.half(), ids, logprobs)
    with pytest.raises(ValueError, match="ids is"):
        most_likely(logits, ids.long(), logprobs)
    with pytest.raises(ValueError, match="logprobs is"):
        most_likely(logits, ids, logprobs[:1])
    with pytest.raises(ValueError, match="too wide"):
        most_likely(torch.zeros(1, 1 << 17, device=device), ids[:1], logprobs[:1], block=16)
