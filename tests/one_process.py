"""What every program that torchrun starts begins and ends with."""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch

from dpo_opt.optimize.processes.distributed import World, process_group, world_from_environment
from dpo_opt.schemas.errors import DpoOptError


@contextlib.contextmanager
def one_of_a_run(**timeout: timedelta) -> Iterator[World]:
    """This process's place in the run, connected to the others; the process ends with the block."""
    torch.set_num_threads(1)
    here = world_from_environment(os.environ)
    try:
        with process_group(here, **timeout):
            yield here
    except DpoOptError as error:
        print(error, file=sys.stderr)
        _leave(error.exit_code)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """As dpo_opt/__main__.py does: threads of torch may abort the process otherwise."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
