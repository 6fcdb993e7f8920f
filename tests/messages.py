"""Chat messages as rows of data hold them."""

from typing import Any


def said(role: str, content: str | None, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def user(content: str) -> dict[str, Any]:
    return said("user", content)


def assistant(content: str | None = "", **others: Any) -> dict[str, Any]:
    return said("assistant", content, **others)
