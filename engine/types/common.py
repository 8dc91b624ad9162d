"""What all that travels is made of: fingerprints, and what a row of an archive can be."""

import hashlib
import json

__all__ = ["VALID_GOOD", "VALID_NOT_WRITTEN", "VALID_REMOVED", "VALID_UNREADABLE", "fingerprint_of", "many"]

VALID_NOT_WRITTEN, VALID_GOOD, VALID_UNREADABLE, VALID_REMOVED = 0, 1, 2, 3


def fingerprint_of(value: object, digits: int = 16) -> str:
    """The first `digits` hex digits of the sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def many(count: int, one: str, several: str = "") -> str:
    """A number and what it counts, in words. several: where that is not `one` with an s."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"
