"""The most likely token: twin of the kernel in triton/greedy.py."""

from __future__ import annotations

import torch
from torch import Tensor


def most_likely(logits: Tensor, ids: Tensor, logprobs: Tensor) -> None:
    """Find the most likely token of each row, of equal ones the first, and its log probability.

    logits: float32 [N, V]; ids: int32 [N] and logprobs: float32 [N], where to write them
    """
    best = logits.argmax(dim=1, keepdim=True)
    ids.copy_(best[:, 0])
    torch.sub(logits.gather(1, best)[:, 0], logits.logsumexp(dim=1), out=logprobs)
