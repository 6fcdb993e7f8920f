"""Counts in words that agree with them."""


def counted(count: int, noun: str) -> str:
    """A count with what it counts: ``1 shard``, ``2,048 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def are(count: int) -> str:
    """The verb behind a count: ``is`` or ``are``."""
    return "is" if count == 1 else "are"
