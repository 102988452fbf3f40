import pytest
import torch
from torch import Tensor

from aquifer.kernels import norms as plain
from aquifer.kernels.triton.norms import add_rms_norm, rms_norm, swiglu

# The interpreter truncates to bfloat16 where a device rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
if torch.cuda.is_available():
    TOLERANCE[torch.bfloat16] = 2e-2
EPSILON = 1e-5


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (7, 960), (3, 5, 128), (0, 16)])
def test_rms_norm_equals_its_twin(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    x, weight = (normal(*size, dtype=dtype, device=device) for size in (shape, shape[-1:]))
    tolerance = TOLERANCE[dtype]
    found, expected = rms_norm(x, weight, EPSILON), plain.rms_norm(x, weight, EPSILON)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    residual = x.flip(0)
    found, total = add_rms_norm(x, residual, weight, EPSILON)
    expected, _ = plain.add_rms_norm(x, residual, weight, EPSILON)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(total, x + residual)
    assert launched == ["_rms_norm", "_rms_norm"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 1408), (3, 8)])
def test_swiglu_equals_its_twin(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, launched: list[str]
) -> None:
    gate, up = normal(rows, 2 * width, dtype=dtype, device=device).split(width, dim=1)
    found = swiglu(gate, up)
    torch.testing.assert_close(found, plain.swiglu(gate, up), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert launched == ["_swiglu"]


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    x = torch.zeros(3, 16, device=device)
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(x, x[0, :8], EPSILON)
    with pytest.raises(ValueError, match="residual is"):
        add_rms_norm(x, x.half(), x[0], EPSILON)
    with pytest.raises(ValueError, match="not contiguous"):
        rms_norm(x[:, :8], x[0, :8], EPSILON)
    with pytest.raises(ValueError, match="up is"):
        swiglu(x, x[:2])
