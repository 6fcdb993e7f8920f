"""A scheduler or a person takes the machine back: stop at once, leave nothing half done, say what goes on."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from dpo_opt.schemas.errors import Interrupted, Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_OF_SHARDS = "finished shards are committed; the one in work is abandoned"


def same_command() -> str:
    """The command that this process was started with."""
    return shlex.join(["dpo-opt", *sys.argv[1:]])


@contextlib.contextmanager
def preemptible(resume: str, *, kept: str = _OF_SHARDS) -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into ``Preempted``, and Ctrl-C into ``Interrupted``, while the block runs.

    What is being written then is abandoned under its private name; what was finished is whole.

    Args:
        resume: The command that goes on.
        kept: What is kept, and what is not, in words.

    Raises:
        Preempted, Interrupted: The block was stopped.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Preempted(
            f"stopped by {signal.Signals(number).name}",
            why=kept,
            fix=resume,
        )

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted", why=kept, fix=resume) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
