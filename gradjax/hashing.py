"""One way to tell texts apart by a digest."""

import hashlib


def sha256(text: str) -> str:
    """64 hex digits of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
