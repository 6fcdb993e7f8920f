"""Processes that meet as a launcher's variables say; then, where asked, one of them ends without a word.

torchrun_meeting.py SECONDS [RANK_THAT_ENDS]
"""

import os
import sys
from datetime import timedelta

from processes import leave

from dpo_opt.optimize.processes.distributed import any_rank, from_first, process_group, world_from_environment
from dpo_opt.schemas.errors import DpoOptError

if __name__ == "__main__":
    here = world_from_environment(os.environ)
    ends = int(sys.argv[2]) if sys.argv[2:] else -1
    try:
        with process_group(here, timeout=timedelta(seconds=float(sys.argv[1]))):
            print(from_first(40 + here.rank, here), flush=True)
            if here.rank == ends:
                os._exit(9)
            any_rank(False, here)
    except DpoOptError as error:
        print(error, file=sys.stderr)
        leave(error.exit_code)
    leave()
