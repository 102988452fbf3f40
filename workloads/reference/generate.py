"""Batched greedy generation for the evaluation after training: static KV cache, CUDA graph per step.

The service's own decoding lives in server/engine; this loop exists so that training depends on no server.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from aquifer.workloads.reference.model import (
    HEAD_DIM,
    KV_HEADS,
    Weights,
    after_attention,
    before_attention,
    causal_attention,
    rotary_table,
    weights_of,
)
from aquifer.workloads.reference.tokenizer import EOS_ID


class GreedyGenerator:
    """Generate for many prompts at once, in the dtype of the model's weights."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._weights: Weights = weights_of(model)
        self._eps = model.config.rms_norm_eps
        self._device = model.device

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Ids generated after each prompt, without the final <eos> (or cut at `max_new_tokens`)."""
        w, device = self._weights, self._device
        rows = len(prompts)
        # A multiple of 64: fast attention kernels want the mask's rows aligned.
        capacity = -(-(max(map(len, prompts)) + max_new_tokens) // 64) * 64
        cos, sin = rotary_table(capacity, device)
        shape = (len(w.layers), rows, KV_HEADS, capacity, HEAD_DIM)
        keys = torch.zeros(shape, dtype=w.embedding.dtype, device=device)
        values = torch.zeros_like(keys)
        tokens = torch.tensor(
            [self._prefill(p, keys[:, i], values[:, i], cos, sin) for i, p in enumerate(prompts)]
        )

        tokens = tokens.to(device)
        positions = torch.tensor([len(p) for p in prompts], device=device)
        row_index, columns = torch.arange(rows, device=device), torch.arange(capacity, device=device)
        done = torch.zeros(rows, dtype=torch.bool, device=device)

        def step() -> None:
            visible = (columns[None] <= positions[:, None])[:, None, None]
            x = F.embedding(tokens, w.embedding)
            for index, layer in enumerate(w.layers):
                q, k, v = before_attention(x, layer, cos[positions], sin[positions], self._eps)
                keys[index][row_index, :, positions] = k
                values[index][row_index, :, positions] = v
                grouped = q.unflatten(1, (k.shape[1], -1))  # query heads that share a KV head become its rows
                out = F.scaled_dot_product_attention(grouped, keys[index], values[index], attn_mask=visible)
                x = after_attention(x, out.flatten(1), layer, self._eps)
            tokens.copy_(self._next_token(x))
            done.logical_or_(tokens == EOS_ID)
            positions.add_(1).clamp_(max=capacity - 1)

        run = self._captured(step, (tokens, positions, done)) if device.type == "cuda" else step
        produced = [tokens.clone()]
        done |= tokens == EOS_ID
        for count in range(1, max_new_tokens):
            if count % 32 == 0 and bool(done.all()):
                break
            run()
            produced.append(tokens.clone())
        return [_until(row, EOS_ID) for row in torch.stack(produced, dim=1).tolist()]

    def _prefill(self, prompt: list[int], keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> int:
        """Fill the cache of one row (keys, values: [L, H, capacity, D]) and return its first new token."""
        w, length = self._weights, len(prompt)
        x = F.embedding(torch.tensor(prompt, device=self._device), w.embedding)
        for index, layer in enumerate(w.layers):
            q, k, v = before_attention(x, layer, cos[:length], sin[:length], self._eps)
            keys[index, :, :length], values[index, :, :length] = k.transpose(0, 1), v.transpose(0, 1)
            x = after_attention(x, causal_attention(q, k, v, rows=1), layer, self._eps)
        return int(self._next_token(x[-1:])[0])

    def _next_token(self, x: Tensor) -> Tensor:
        w = self._weights
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps) * w.norm.float()
        return F.linear(normed.to(x.dtype), w.embedding).argmax(-1)

    @staticmethod
    def _captured(step: Callable[[], None], state: tuple[Tensor, ...]) -> Callable[[], None]:
        """`step` as a CUDA graph; `state` is put back to what it was before the warm-up calls.

        Warm-up writes cache rows at positions that the first real steps write again, so the cache is safe.
        """
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for tensor, saved in zip(state, before, strict=True):
            tensor.copy_(saved)
        return graph.replay


def _until(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids
