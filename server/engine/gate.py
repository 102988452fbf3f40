"""Whether loading stored KV is worth it: a load slower than recomputing is not done.

Peers' users found a remote cache slower than prefill. The engine therefore keeps running estimates
of what it measured itself, and compares. Nothing is refused before both sides were measured.
"""

from __future__ import annotations

import threading

_WEIGHT = 0.3
"""Share of the newest measurement in the estimate: follows a change of load within a few requests."""

_RETRY_EVERY, _RETRY_RUN = 400, 8
"""Of so many segments that would be refused, so many in a row are loaded all the same: a tier that became
fast is noticed. A single one would tell how long a round trip takes, and not how fast a prompt comes."""


class LoadGate:
    """Running estimates of prefill and restore speed, in tokens per second. Thread-safe."""

    def __init__(self, *, always: bool) -> None:
        """always: load whatever is stored, so that text does not depend on timing."""
        self._always = always
        self._rates: dict[str, float] = {}
        self._refused = 0
        self._lock = threading.Lock()

    def measured(self, source: str, tokens: int, seconds: float) -> None:
        """source: `computed` or a tier's name."""
        if tokens <= 0 or seconds <= 0:
            return
        with self._lock:
            old = self._rates.get(source, tokens / seconds)
            self._rates[source] = (1 - _WEIGHT) * old + _WEIGHT * tokens / seconds

    def worth_loading(self, tier: str) -> bool:
        """Whether to load a segment from this tier: where that is faster, and now and then to see whether it
        has become so."""
        if self.faster(tier):
            return True
        with self._lock:
            self._refused += 1
            return (self._refused - 1) % _RETRY_EVERY >= _RETRY_EVERY - _RETRY_RUN

    def faster(self, tier: str) -> bool:
        """Whether KV in this tier is on the device sooner by loading than by computing, as far as is
        known."""
        with self._lock:
            load, compute = self._rates.get(tier), self._rates.get("computed")
            return self._always or load is None or compute is None or load >= compute
