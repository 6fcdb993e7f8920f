"""Writes the HTML page of ``dpo-opt check --html`` from an audit's record; it computes nothing itself."""

import math
from pathlib import Path

from dpo_opt.analysis.html import render
from dpo_opt.analysis.intervals import Interval
from dpo_opt.schemas.audit_record import Audit
from dpo_opt.schemas.outputs import output_mark, require_own_output
from dpo_opt.schemas.storage import write_text


def write_check_page(audit: Audit, output: Path) -> None:
    """Write the page of an audit. The page has no script and loads no other file.

    Args:
        audit: The record. Parts that are None or empty are left out, or one line says how to get them.
        output: The HTML file; an earlier page is replaced.

    Raises:
        ConfigError: The output is a folder, or a file that is no such page.
    """
    require_own_output(output, option="--html", command="check")
    reference = audit.reference
    accuracy = None
    if reference is not None:
        bounds = reference.ranking_accuracy_interval or (math.nan, math.nan)
        accuracy = Interval(reference.ranking_accuracy, *bounds)
    page = render(
        "check.html.jinja", audit=audit, reference_accuracy=accuracy, written_by=output_mark("check")
    )
    write_text(output, page)
