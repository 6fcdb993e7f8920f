"""A full disk, said by name whichever library met it."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dpo_opt.schemas.errors import AGAIN, DpoOptError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries in Rust raise a class of their own, or none, and end the system's message with this.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def room_on_disk(folder: Path) -> Iterator[None]:
    """Turn the failure of a full disk into an error that names it.

    Raises:
        DpoOptError: The disk is full or over quota.
        OSError: The system failed otherwise; the error names the folder if it named no file.
    """
    try:
        yield
    except DpoOptError:
        raise
    # Not OSError alone: libraries in Rust have classes of their own. What is no full disk is raised as it is.
    except Exception as error:
        code = _system_code(error)
        if code in DISK_FULL:
            raise DpoOptError(
                f"the disk is full ({os.strerror(code)})",
                where=str(folder),
                why="what was being written could not be written whole, so nothing of it was kept",
                fix=f"free some space there, then {AGAIN}",
            ) from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder)
        elif code is not None and not isinstance(error, OSError):
            raise OSError(code, os.strerror(code), str(folder)) from error
        raise


def _system_code(error: Exception) -> int | None:
    """The system's number for a failure; libraries in Rust state it in the message only."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None
