"""A whole decode step and a chunk of prefill by the kernels equal those by plain operations."""

import pytest
import torch
from tiny_models import tiny_model

from aquifer.kernels.backend import PLAIN, triton_backend
from aquifer.server.engine.graphs import GraphedStep, PagedLanes
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.runner import ModelRunner, PagedCache, Rows
from aquifer.server.models.adapter import DecoderAdapter


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_equal_those_of_plain_operations(
    family: str, device: torch.device, launched: list[str]
) -> None:
    model = tiny_model(family).to(device)
    logits = []
    for backend in (PLAIN, triton_backend()):
        adapter = DecoderAdapter(model, max_tokens=4096, backend=backend)
        pool = PagePool(adapter.spec, 4 * 256 * adapter.spec.bytes_per_token, device, keep=False)
        lanes = PagedLanes(pool, adapter.backend, 2, 2)
        steps = [GraphedStep(adapter, pool, lanes, 2, memory=None)] if backend.fuses else []
        runner = ModelRunner(adapter, pool, steps)
        caches = [PagedCache(pool, BlockTable(pages)) for pages in ([2, 0], [1, 3])]
        first, _ = runner.prefill(range(4), 0, caches[0])
        second, _ = runner.prefill(range(100, 102), 4, caches[0])
        runner.prefill(range(50, 53), 0, caches[1])
        stepped = runner.step([Rows([7], 6, caches[0]), Rows([9], 3, caches[1])])
        logits.append((runner.logits(torch.cat((first, second))), *stepped))
    for one, other in zip(*logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {"_rms_norm", "_swiglu", "_rotate_store", "_attend_split", "_merge_splits"} <= set(launched)
    assert {"_find_best", "_join_best"} <= set(launched)
