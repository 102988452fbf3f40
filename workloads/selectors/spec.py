"""Methods by name, and how one is written: `name`, `name:BUDGET`, `name:BUDGET:knob=value:...`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from aquifer.workloads.selectors.base import TokenSelector
from aquifer.workloads.selectors.chunks import Chunks
from aquifer.workloads.selectors.full import Full
from aquifer.workloads.selectors.landmarks import TokenLandmarks
from aquifer.workloads.selectors.oracle import Oracle
from aquifer.workloads.selectors.quest import Quest
from aquifer.workloads.selectors.shadowkv import ShadowKV
from aquifer.workloads.selectors.window import Window

METHODS: dict[str, type[TokenSelector]] = {
    "full": Full,
    "window": Window,
    "oracle": Oracle,
    "landmarks": TokenLandmarks,
    "chunks": Chunks,
    "shadowkv": ShadowKV,
    "quest": Quest,
}
_SWITCH = {"on": True, "off": False}


def parse_method(text: str) -> TokenSelector:
    """Read one method, `landmarks:0.05:heads=shared` for instance.

    Raises ValueError that lists the methods, or the method's knobs, or the values a knob takes.
    """
    name, *settings = text.strip().split(":")
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    method = METHODS[name]
    kinds = get_type_hints(method)
    knobs = [f.name for f in fields(method)]  # type: ignore[arg-type]  # every method is a dataclass
    given: dict[str, Any] = {}
    for position, setting in enumerate(settings):
        knob, equals, value = setting.partition("=")
        if not equals and position == 0:
            knob, value = "budget", setting
        if knob not in knobs or knob in given:
            raise ValueError(f"{text!r}: {describe(name)}")
        given[knob] = _value(text, knob, kinds[knob], value)
    try:
        return method(**given)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error


def describe(name: str) -> str:
    """How a method is written, with its defaults."""
    knobs = [f"{f.name}={_shown(f.default)}" for f in fields(METHODS[name])]  # type: ignore[arg-type]
    return f"{name} takes {', '.join(knobs)}" if knobs else f"{name} takes nothing"


def canonical(text: str) -> str:
    """The same method written in one way: defaults left out, knobs in their order."""
    method = parse_method(text)
    name = text.strip().split(":")[0]
    parts = [name]
    for knob in fields(method):  # type: ignore[arg-type]
        value = getattr(method, knob.name)
        if knob.name == "budget":
            parts.append(f"{value:g}")
        elif knob.default is MISSING or value != knob.default:
            parts.append(f"{knob.name}={_shown(value)}")
    return ":".join(parts)


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _value(text: str, knob: str, kind: Any, value: str) -> Any:
    choices = list(get_args(kind)) if get_origin(kind) is Literal else list(_SWITCH) if kind is bool else None
    if choices is not None:
        if value not in choices:
            raise ValueError(f"{text!r}: {knob} is one of {', '.join(choices)}, not {value!r}")
        return _SWITCH[value] if kind is bool else value
    try:
        return kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text!r}: {knob} is {wanted}, not {value!r}") from None
