"""What a store's refusals mean: clients raise their own errors, also a missing file for a missing bucket."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from upath import UPath

from dpo_opt.schemas.errors import AGAIN, DpoOptError, first_line, quoted
from dpo_opt.schemas.full_disk import DISK_FULL


def store_errors() -> tuple[type[Exception], ...]:
    """What a store may raise: clients have errors of their own, with no common base."""
    botocore = sys.modules.get("botocore.exceptions")
    aiohttp = sys.modules.get("aiohttp")
    return (
        OSError,
        *([botocore.BotoCoreError, botocore.ClientError] if botocore else []),
        *([aiohttp.ClientError] if aiohttp else []),
    )


@contextlib.contextmanager
def explained(path: Path | UPath) -> Iterator[None]:
    """Say a store's refusal by its URL; errors of this machine's paths are left as they are.

    Raises:
        DpoOptError: The store does not answer, or refuses; or there is no such bucket.
    """
    try:
        yield
    except store_errors() as error:
        if isinstance(path, Path) or getattr(error, "errno", None) in DISK_FULL:
            raise
        if is_missing_bucket(error):
            protocol, _, rest = str(path).partition("://")
            bucket = f"{protocol}://{rest.partition('/')[0]}"
            raise DpoOptError(
                f"the store has no bucket {quoted(bucket)}",
                where=str(path),
                why="it is not an empty folder: nothing can be read from there, or written to it",
                fix=f"check the URL and AWS_ENDPOINT_URL, or create the bucket; then {AGAIN}",
            ) from error
        raise DpoOptError(
            f"the store refuses or does not answer ({first_line(error)})",
            where=str(path),
            why="what was committed there is not touched",
            fix=f"check the URL and the credentials in the environment, then {AGAIN}",
        ) from error


def is_missing_bucket(error: BaseException) -> bool:
    """Whether a store has said that there is no such bucket; s3fs makes a FileNotFoundError of it."""
    response = getattr(error.__cause__ or error, "response", None)
    return isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket"


@contextlib.contextmanager
def nothing_there() -> Iterator[None]:
    """Go on where a store has no such file or folder, unless its bucket is missing."""
    try:
        yield
    except FileNotFoundError as error:
        if is_missing_bucket(error):
            raise
