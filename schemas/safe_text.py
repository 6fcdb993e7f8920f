"""Text of a model or a stranger, made safe to show: it is shown, never trusted."""

import re

# Controls (a terminal's escape among them) other than tab and newline, and the invisible characters
# that reorder text (Trojan Source, CVE-2021-42574).
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text without control characters and without characters that reorder it."""
    return _UNSAFE.sub("", text)
