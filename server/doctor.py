"""What this machine has of what the service can use, and how to get the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from aquifer.cachestore.redis_link import RedisLink
from aquifer.compression.predictors import PredictorsError, read_card
from aquifer.server.settings import GIB, Settings

Status = Literal["ok", "optional", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. status: ok; optional: the service runs without, worse; missing: it does not
    start. advice: what to do about it, empty when ok."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Look at everything `serve` would use with these settings. Loads no weights."""
    return [
        _python(),
        _gpu(settings),
        _triton(),
        _memory(settings),
        _redis(settings),
        _model(settings),
        _predictors(settings),
    ]


def hide_password(url: str) -> str:
    """A URL that may be shown."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}"))


def _python() -> Finding:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return Finding("python", "ok", f"Python {platform.python_version()}, {packages}")


def _gpu(settings: Settings) -> Finding:
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found = f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / GIB:.0f} GiB"
        return Finding("gpu", "ok", found)
    reason = "torch was built without CUDA" if torch.version.cuda is None else "no device is visible"
    if settings.device.startswith("cuda"):
        return Finding(
            "gpu", "missing", reason, "AQUIFER_DEVICE asks for CUDA: use a GPU or AQUIFER_DEVICE=auto"
        )
    advice = (
        "the CPU serves small models; larger ones need an NVIDIA GPU, its driver and a CUDA build of torch"
    )
    return Finding("gpu", "optional", reason, advice)


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding(
            "triton", "optional", "not installed", "plain PyTorch is used; CUDA builds of torch bring it"
        )
    import triton

    return Finding("triton", "ok", f"triton {triton.__version__}")


def _memory(settings: Settings) -> Finding:
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{available / GIB:.1f} GiB of RAM, {settings.ram_bytes / GIB:.1f} GiB of it for the cache"
    if settings.ram_bytes > 0.8 * available:
        return Finding("memory", "missing", found, "lower AQUIFER_RAM_BYTES: the arena is taken at the start")
    return Finding("memory", "ok", found)


def _redis(settings: Settings) -> Finding:
    if not settings.redis_url:
        advice = "documents are lost with the process; set AQUIFER_REDIS_URL=redis://host:6379 to keep them"
        return Finding("redis", "optional", "not configured", advice)
    address = hide_password(settings.redis_url)
    try:
        link = RedisLink(settings.redis_url, timeout_seconds=settings.redis_timeout_seconds)
    except ValueError as error:
        return Finding("redis", "missing", address, f"{error}; AQUIFER_REDIS_URL must be a Redis URL")
    try:
        info = link.server_info() if link.up else None
    finally:
        link.close()
    if info is None:
        advice = "the service runs without and connects when it is there: is it up, is the password right?"
        return Finding("redis", "optional", f"{address} does not answer", advice)
    bound = f"of {info.capacity_bytes / GIB:.1f} GiB" if info.capacity_bytes else "with no maxmemory set"
    advice = (
        ""
        if info.capacity_bytes
        else "set maxmemory and an eviction policy, or Redis grows until it is killed"
    )
    status: Literal["ok", "optional"] = "ok" if info.capacity_bytes else "optional"
    return Finding(
        "redis", status, f"{address} answers, {info.used_bytes / GIB:.2f} GiB used {bound}", advice
    )


def _model(settings: Settings) -> Finding:
    folder = Path(settings.model_path)
    if (folder / "config.json").is_file():
        has_weights = any(folder.glob("*.safetensors"))
        if has_weights:
            return Finding("model", "ok", str(settings.model))
        return Finding(
            "model", "missing", f"{folder} has a config.json but no *.safetensors", _model_advice(settings)
        )
    if folder.exists() or settings.model == "reference":
        return Finding("model", "missing", f"{folder} has no config.json", _model_advice(settings))
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(settings.model, "config.json"), str):
        return Finding("model", "ok", f"{settings.model}, in the hub's cache")
    advice = "the start downloads it (HF_TOKEN for gated models); or give a folder: AQUIFER_MODEL=/path"
    return Finding("model", "optional", f"{settings.model}, not downloaded yet", advice)


def _model_advice(settings: Settings) -> str:
    if settings.model == "reference":
        return "`aquifer train-reference` makes the bundled model again"
    return "AQUIFER_MODEL must be a checkpoint folder as transformers saves it, or a hub name"


def _predictors(settings: Settings) -> Finding:
    folder = settings.predictors or Path(settings.model_path) / "predictors"
    codec = settings.codec
    try:
        card, _ = read_card(folder)
    except (OSError, PredictorsError) as error:
        status: Status = "missing" if codec.startswith("aqua") else "optional"
        advice = "`aquifer calibrate` makes them; without, higgs:4 takes about twice the bytes"
        return Finding("predictors", status, str(error), advice)
    found = f"{folder}, from {card.tokens:,} tokens of {card.data}"
    if codec.endswith(":int8") and not card.tells_spreads:
        advice = f"`aquifer calibrate` makes new ones; or AQUIFER_CODEC={codec.removesuffix(':int8')}"
        return Finding("predictors", "missing", f"{found}: too old to tell {codec} how values spread", advice)
    return Finding("predictors", "ok", found)
