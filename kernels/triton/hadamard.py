"""The Hadamard matrix inside a kernel, made of registers: nothing is read for it."""

import triton
import triton.language as tl

LEAST = 16
"""Rows and columns that a product of matrices has at least."""


def factors(group: int) -> tuple[int, int]:
    """Sizes of the two matrices that turn a group of channels, a power of two; see `turn_group`."""
    left = 1 if group < LEAST**2 else 1 << (group.bit_length() - 1) // 2
    return left, group // left


@triton.jit
def sylvester(SIZE: tl.constexpr, COPIES: tl.constexpr = 1) -> tl.tensor:
    """float32 [SIZE, SIZE] of ±1, SIZE a power of two up to 4096: entry (i, j) is (-1)^popcount(i & j).

    COPIES: so many interleaved ones, [SIZE * COPIES, SIZE * COPIES], with 0 where they do not meet.
    The caller divides products with it by sqrt(SIZE). Twin: aquifer.kernels.hadamard.hadamard_matrix.
    """
    i = tl.arange(0, SIZE * COPIES)
    common = (i // COPIES)[:, None] & (i // COPIES)[None, :]
    # The parity of the bits, folded into the lowest.
    common = common ^ (common >> 8)
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    entry = 1 - 2 * (common & 1)
    if COPIES > 1:
        entry = tl.where((i % COPIES)[:, None] == (i % COPIES)[None, :], entry, 0)
    return entry.to(tl.float32)


@triton.jit
def turn(x: tl.tensor, SIZE: tl.constexpr, EXACT: tl.constexpr, COPIES: tl.constexpr = 1) -> tl.tensor:
    """x @ sylvester(SIZE, COPIES), x: float32 [R, SIZE * COPIES].

    Tensor cores take operands of 11 significant bits, of which ±1 needs one. EXACT multiplies the bits that
    they would cut off as well; without it the result is finer than bfloat16, and as fine as float16.
    """
    matrix = sylvester(SIZE, COPIES)
    if EXACT:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        rest = tl.dot(x - high, matrix, input_precision="tf32")
        return tl.dot(high, matrix, rest, input_precision="tf32")
    return tl.dot(x, matrix, input_precision="tf32")


@triton.jit
def turn_group(x: tl.tensor, LEFT: tl.constexpr, RIGHT: tl.constexpr, EXACT: tl.constexpr) -> tl.tensor:
    """x @ sylvester(LEFT * RIGHT), x: float32 [T, LEFT * RIGHT].

    The matrix is a Kronecker product, so rows seen as matrices [LEFT, RIGHT] are turned by a small matrix
    from each side; one of less than LEAST is made large enough by copies.
    """
    rows: tl.constexpr = x.shape[0]
    x = turn(tl.reshape(x, [rows * LEFT, RIGHT]), RIGHT, EXACT)
    if LEFT > 1:
        copies: tl.constexpr = (16 + LEFT - 1) // LEFT
        height: tl.constexpr = LEFT * copies
        width: tl.constexpr = RIGHT // copies
        x = tl.permute(tl.reshape(x, [rows, height, width]), [0, 2, 1])
        x = turn(tl.reshape(x, [rows * width, height]), LEFT, EXACT, copies)
        x = tl.permute(tl.reshape(x, [rows, width, height]), [0, 2, 1])
    return tl.reshape(x, [rows, LEFT * RIGHT])
