"""Say what went wrong in training runs, and one thing to do.

RUNS are folders of runs or of sweeps. Each finding has its evidence. Nothing but the run and its shards is
needed: no model, no GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpo_opt.options import json_option
from dpo_opt.results import say, show
from dpo_opt.schemas.counts import counted

if TYPE_CHECKING:
    from dpo_opt.analysis.diagnosis.finding import Diagnosis

_SHOWN_PAIRS = 8


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    from dpo_opt.analysis.diagnosis.diagnose import diagnose
    from dpo_opt.sweep.grid import run_folders

    found = [diagnose(run) for path in runs for run in run_folders(path)]
    if as_json:
        show({"runs": [each.record() for each in found]}, as_json)
    else:
        say(line for each in found for line in _lines(each))


def _lines(diagnosis: "Diagnosis") -> Iterator[str]:
    verdicts = {
        "found": counted(len(diagnosis.findings), "finding"),
        "healthy": "healthy",
        "undecided": "nothing clear: no known fault was found, nor that the run learned something",
        "unknown": "nothing was found, but no pair shows how the policy does on pairs it has not seen",
    }
    yield f"{diagnosis.run}: {verdicts[diagnosis.verdict]}"
    yield from (f"   {doubt}" for doubt in diagnosis.doubts if diagnosis.verdict == "undecided")
    if diagnosis.unfinished:
        yield f"the run is not finished, and is judged as far as it came; to go on: {diagnosis.unfinished}"
    for number, finding in enumerate(diagnosis.findings, start=1):
        yield ""
        yield f"{number}. {finding.title}"
        yield from (f"   {measure.line}" for measure in finding.evidence)
        if finding.pairs:
            rows = ", ".join(str(pair.row) for pair in finding.pairs[:_SHOWN_PAIRS])
            yield f"   rows, the clearest first: {rows}"
        yield f"   do: {finding.action}"
    yield ""
    yield f"judged by {diagnosis.judged_by}"
    yield "looked for:"
    for check in diagnosis.checks:
        yield f"  {check.result:<7}  {check.asked}" + (f" ({check.reason})" if check.reason else "")
