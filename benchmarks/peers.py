"""What others give for the same work, run in the same process on the same weights.

hf-dynamic       transformers' DynamicCache: prefill, decode
hf-offloaded     DynamicCache(offloading=True): KV in host memory, copied in for every step; decode
hf-quanto        QuantizedCache (quanto, 4 bits): decode
hf-static-graph  StaticCache, the step captured as a CUDA graph: decode
raw-copy         no model: uncompressed KV copied between host and device; restore, store

A cache is filled with random keys and values instead of a prefill: a step costs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import StaticLayer

from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, Report, Run, clocked, clocked_fresh

PeerName = Literal["hf-dynamic", "hf-offloaded", "hf-quanto", "hf-static-graph", "raw-copy"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)

PREFILL_CHUNK_TOKENS = 16_384
"""As many as fit: one pass is the fastest that transformers does on short prompts."""

QUANTO_BITS = 4

WARM_UP_STEPS = 3


def taking_part(
    report: Report, subject: Subject, names: Sequence[str], makers: Mapping[str, Callable[[], Run]]
) -> list[Contestant]:
    """Those of the named peers that do this work and can run here; the report says why not of the others.

    makers: by peer, what prepares it to run.
    """
    contestants = []
    for name in names:
        reason = why_not(name, subject.device)
        if reason is None and name not in makers:
            reason = f"does not do this; {', '.join(makers)} do" if makers else "does not do this"
        if reason is None:
            try:
                contestants.append(Contestant(name, "peer", makers[name]()))
            except RuntimeError as error:  # out of memory, or a step that cannot be captured
                reason = str(error).partition("\n")[0]
        if reason is not None:
            report.left_out[name] = reason
    return contestants


def load_hf(subject: Subject) -> PreTrainedModel:
    """The model as transformers runs it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=subject.dtype)
    model.to(subject.device)  # type: ignore[arg-type]  # transformers' stub forgets torch.device
    return model.eval()


def hf_prefill(subject: Subject, model: PreTrainedModel, tokens: int) -> Run:
    """Read a fresh random prompt into a DynamicCache."""

    def prepare() -> Callable[[], object]:
        ids = torch.randint(subject.config.vocab_size, (1, tokens), device=subject.device)

        @torch.inference_mode()
        def work() -> None:
            cache = DynamicCache(config=model.config)
            for piece in ids.split(PREFILL_CHUNK_TOKENS, dim=1):
                model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return work

    return clocked_fresh(subject.device, prepare)


def hf_decode(
    peer: PeerName, subject: Subject, model: PreTrainedModel, tokens: int, steps: int, batch: int = 1
) -> Run:
    """Seconds of one decode step behind `tokens` tokens of context, the mean of `steps`.

    batch: contexts, all of them answered in one step."""
    cache: Any
    if peer == "hf-quanto":
        cache = QuantizedCache("quanto", model.config, nbits=QUANTO_BITS)
    elif peer == "hf-static-graph":
        cache = StaticCache(config=model.config, max_cache_len=tokens + max(steps, WARM_UP_STEPS))
    else:
        cache = DynamicCache(config=model.config, offloading=peer == "hf-offloaded")
    _fill(cache, subject, tokens, batch)
    step = (_captured_step if peer == "hf-static-graph" else _step)(model, cache, batch)

    @torch.inference_mode()
    def work() -> None:
        for _ in range(steps):
            step()

    def prepare() -> Callable[[], object]:
        # A static cache attends to all of its slots, so it gets no more than it needs and starts again. The
        # others grow by a few steps in each run, little against the context.
        if isinstance(cache, StaticCache):
            _rewind(cache, tokens)
        return work

    run = clocked_fresh(subject.device, prepare)
    return lambda: run() / steps


def raw_copy(subject: Subject, tokens: int, *, to_device: bool) -> Run:
    """Copy the uncompressed KV of `tokens` tokens, layer by layer, from pinned host memory or to it."""
    spec = subject.spec
    shape = (spec.num_layers, 2, tokens, spec.channels)
    pinned = subject.device.type == "cuda"
    host = torch.empty(shape, dtype=spec.dtype, pin_memory=pinned)
    host.copy_(torch.randn(1, 1, 1, spec.channels).to(spec.dtype).expand(shape))
    device = torch.empty_like(host, device=subject.device, pin_memory=False)
    source, target = (host, device) if to_device else (device, host)

    def work() -> None:
        for layer in range(spec.num_layers):
            target[layer].copy_(source[layer], non_blocking=True)

    return clocked(subject.device, work)


def why_not(peer: str, device: torch.device) -> str | None:
    """Why a peer cannot run here, in one line; None if it can."""
    if peer not in PEERS:
        return f"unknown peer; there are {', '.join(PEERS)}"
    if peer in ("hf-offloaded", "hf-static-graph") and device.type != "cuda":
        return "needs CUDA"
    if peer == "hf-quanto" and find_spec("optimum.quanto" if find_spec("optimum") else "optimum") is None:
        return "needs the package optimum-quanto"
    return None


def _fill(cache: Any, subject: Subject, tokens: int, batch: int) -> None:
    """Random keys and values of `tokens` tokens in every layer."""
    spec = subject.spec
    for layer in range(spec.num_layers):
        shape = (batch, spec.num_kv_heads, tokens, spec.head_dim)
        keys, values = (torch.randn(shape, dtype=spec.dtype, device=subject.device) for _ in range(2))
        cache.update(keys, values, layer)


def _rewind(cache: StaticCache, tokens: int) -> None:
    """Go back to `tokens` tokens. A captured graph keeps the address of the count, so it is set in place."""
    for layer in cache.layers:
        assert isinstance(layer, StaticLayer)
        layer.cumulative_length.fill_(tokens)


def _step(model: PreTrainedModel, cache: Any, batch: int) -> Callable[[], Tensor]:
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def step() -> Tensor:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        return token

    return step


def _captured_step(model: PreTrainedModel, cache: Any, batch: int) -> Callable[[], Tensor]:
    """The same step as a CUDA graph. The cache counts its tokens on the device, so replays move on."""
    step = _step(model, cache, batch)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):  # libraries allocate their workspaces before the capture
                token = step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

    def replay() -> Tensor:
        """Holds on to the token: the graph knows its address only, and would read what else comes there."""
        graph.replay()
        return token

    return replay
