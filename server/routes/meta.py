"""What the service says about itself: /info, /health, /ready, /metrics; and /tokenize."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from importlib.metadata import version
from typing import get_args

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from aquifer.server.engine.types import KVMode
from aquifer.server.routes.body import BodyRoute
from aquifer.server.routes.errors import problems
from aquifer.server.routes.schemas import Health, Info, Ready, TokenizeBody, TokenPlace
from aquifer.server.routes.service import ServiceDep

router = APIRouter(route_class=BodyRoute, tags=["service"])


@router.post("/tokenize", responses=problems(400, 401, 413, 422))
async def tokenize(body: TokenizeBody, service: ServiceDep) -> list[TokenPlace]:
    """The tokens of a text with their places in it, without BOS."""
    return [TokenPlace(**asdict(token)) for token in await service.tokenizer.tokens(body.inputs)]


@router.get("/info", responses=problems(401))
async def info(service: ServiceDep) -> Info:
    """What is served, and within which limits."""
    engine, settings = service.engine.info, service.settings
    return Info(
        model_id=service.model_name,
        model_sha=engine.model_fingerprint,
        model_dtype=engine.dtype,
        model_device_type=engine.device,
        codec=engine.codec,
        codec_fingerprint=engine.codec_fingerprint,
        codec_note=engine.codec_note,
        max_concurrent_requests=settings.max_running_requests,
        max_input_tokens=engine.max_prompt_tokens,
        max_total_tokens=engine.max_total_tokens,
        max_body_bytes=settings.max_body_bytes,
        segment_tokens=engine.segment_tokens,
        device_kv_bytes=engine.device_kv_bytes,
        vocab_size=engine.vocab_size,
        kv_modes=list(get_args(KVMode)),
        version=version("aquifer"),
    )


@router.get("/health")
async def health() -> Health:
    """The process is alive."""
    return Health(status="ok")


@router.get("/ready", responses={503: {"model": Ready, "description": "a tier it cannot do without is down"}})
async def ready(service: ServiceDep, response: Response) -> Ready:
    """Whether requests are served, and how well: without Redis they are, only slower."""
    load = service.engine.load()
    tiers = await asyncio.to_thread(service.engine.store.stats)
    lost = [tier.name for tier in tiers if not tier.up]
    is_ready = "ram" not in lost
    if not is_ready:
        response.status_code = 503
    return Ready(
        ready=is_ready,
        degraded=bool(lost),
        model=service.model_name,
        codec=service.engine.info.codec,
        codec_note=service.engine.info.codec_note,
        running=load.running,
        waiting=load.waiting,
        tiers={tier.name: "up" if tier.up else "down" for tier in tiers},
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceDep) -> Response:
    """All metrics in Prometheus' text format."""
    return Response(await asyncio.to_thread(service.metrics.render), media_type=CONTENT_TYPE_LATEST)
