"""Processes that meet as a launcher's variables say; then, where asked, one of them ends without a word.

torchrun_meeting.py SECONDS [RANK_THAT_ENDS]
"""

import os
import sys
from datetime import timedelta

from one_process import one_of_a_run

from dpo_opt.optimize.processes.distributed import any_rank, from_first

if __name__ == "__main__":
    ends = int(sys.argv[2]) if sys.argv[2:] else -1
    with one_of_a_run(timeout=timedelta(seconds=float(sys.argv[1]))) as here:
        print(from_first(40 + here.rank, here), flush=True)
        if here.rank == ends:
            os._exit(9)
        any_rank(False, here)
