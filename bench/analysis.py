"""What a report takes in CPU seconds, and in which memory, from 100 thousand pairs to 10 million.

    python bench/analysis.py

The run is made up (``synthetic_run.py``): all pairs scored, each trained on once, one prompt in 50 held out
and evaluated five times. "CPU" is that of all threads. Pages of the files are in memory, as after training.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from measure import run
from synthetic_run import make_run

REPORT = """
import resource, sys
from pathlib import Path
from dpo_opt.analysis import report
report([Path(sys.argv[1])], Path(sys.argv[2]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the runs are made, and kept for another time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print("| pairs | rows of all tables | files, GB | CPU seconds | seconds | peak GB |")
        print("|---|---|---|---|---|---|")
        for rows in arguments.rows:
            folder = (arguments.folder or Path(temporary)) / str(rows)
            if not folder.exists():
                make_run(folder, rows)
            _measure(folder, rows)


def _measure(folder: Path, rows: int) -> None:
    files = list(folder.rglob("*.parquet"))
    read = sum(pq.read_metadata(file).num_rows for file in files)
    size = sum(file.stat().st_size for file in files) / 1e9
    command = [sys.executable, "-c", REPORT, str(folder / "run"), str(folder / "report.html")]
    taken = run(command)
    print(
        f"| {rows:,} | {read:,} | {size:.2f} | {float(taken.output):.1f} | {taken.seconds:.1f} "
        f"| {taken.gigabytes:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
