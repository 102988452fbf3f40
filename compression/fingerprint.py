"""One short name for everything that changes bytes or arithmetic."""

import hashlib
import json


def fingerprint(**parts: object) -> str:
    """128 bits of SHA-256 over the canonical JSON of `parts`, in hex.

    Raises TypeError if a part is not JSON: an object's default text would differ between runs.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
