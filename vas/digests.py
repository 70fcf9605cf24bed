"""Short identities of things."""

from __future__ import annotations

import hashlib
from typing import Any


def digest(*parts: Any) -> str:
    """16 hex digits that identify `parts`; unit-separated, so ("ab", "c") differs from ("a", "bc")."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:16]
