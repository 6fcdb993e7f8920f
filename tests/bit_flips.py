"""Damage that no parser need notice."""

from pathlib import Path


def flip(path: Path, place: int | None = None) -> Path:
    """Flip a bit of the byte at a place: by default of the one in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)
    return path
