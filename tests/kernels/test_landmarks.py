import pytest
import torch

from aquifer.compression.aqua import load_quantizer
from aquifer.kernels.higgs import higgs_encode
from aquifer.kernels.landmarks import (
    score_landmarks,
    score_landmarks_ref,
    select_tokens,
    select_tokens_ref,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "heads", "group", "head_dim"), [(1, 1, 1, 16), (77, 2, 3, 32), (300, 4, 2, 64)]
)
def test_scores_equal_their_twin(tokens: int, heads: int, group: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    quantizer = load_quantizer(2, CPU)
    keys = torch.randn(tokens, heads * head_dim, generator=generator)
    codes, scales = higgs_encode(keys, quantizer, head_dim // 2)
    queries = torch.randn(heads * group, head_dim, generator=generator)
    found = score_landmarks(queries, codes, scales, quantizer)
    expected = score_landmarks_ref(queries, codes, scales, quantizer.grid)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_selection_equals_its_twin(shared: bool) -> None:
    scores = 4 * torch.randn(6, 200, generator=torch.Generator().manual_seed(2))
    found = select_tokens(scores, 2, 17, shared=shared)
    assert found.shape == (1 if shared else 2, 17)
    assert torch.equal(found, select_tokens_ref(scores, 2, 17, shared=shared))


def test_a_constant_added_to_a_head_selects_the_same_tokens() -> None:
    """That is what subtracting a mean from the keys does to a query head's scores."""
    scores = torch.randn(4, 100, generator=torch.Generator().manual_seed(3))
    shifted = scores + torch.tensor([[5.0], [-3.0], [0.0], [100.0]])
    for shared in (True, False):
        found = select_tokens(shifted, 2, 10, shared=shared)
        assert torch.equal(found, select_tokens(scores, 2, 10, shared=shared))


def test_all_tokens_can_be_selected() -> None:
    assert select_tokens(torch.randn(2, 5), 1, 5, shared=False).tolist() == [[0, 1, 2, 3, 4]]
