"""Say everything that is wrong or suspicious in DATA, on a CPU.

Exits with 3 where a later command would refuse the data.
"""

from collections.abc import Iterator

import click

from dpo_opt.complete_fix import complete_fix
from dpo_opt.console import watched
from dpo_opt.options import configured, json_option
from dpo_opt.precompute.config import CheckConfig
from dpo_opt.results import say, show, table
from dpo_opt.schemas.audit_record import Audit
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.outputs import require_own_output

_EXAMPLES = 3
_SIGNS = {"error": "ERROR  ", "warning": "warning", "note": "note   "}


@click.command(help=__doc__)
@configured(CheckConfig, argument="data")
@json_option
@click.pass_context
def command(context: click.Context, config: CheckConfig, as_json: bool) -> None:
    from dpo_opt.model_size import count_parameters
    from dpo_opt.precompute.check.audit import audit

    if config.html is not None:
        require_own_output(config.html, option="--html", command="check")
    found = audit(config, progress=watched(), count_parameters=count_parameters)
    for problem in found.problems:
        problem.fix = complete_fix(problem.fix, config)
    if config.shards is not None:
        from dpo_opt.analysis import reference_view

        found.reference = reference_view(config.shards)
    if config.html is not None:
        from dpo_opt.analysis import write_check_page

        write_check_page(found, config.html)
    if as_json:
        show(found.model_dump(), as_json)
    else:
        say(_lines(found))
    if found.refused:
        context.exit(DataError.exit_code)


def _lines(audit: Audit) -> Iterator[str]:
    from dpo_opt.precompute.tokens.template_date import ChosenDate

    for data in audit.data:
        bad = f", {counted(data.bad_rows, 'bad row')}" if data.bad_rows else ""
        yield f"{data.name}: {counted(data.pairs, audit.noun)}{bad}, read as {data.form}"
    yield ""
    yield from _problem_lines(audit)
    if not audit.pairs:
        return
    date = ChosenDate(audit.template_date, audit.template_date_from).in_words()
    if date is not None:
        yield ""
        yield date
    yield ""
    yield from table(
        [f"length in {audit.unit}", "mean", "p50", "p90", "p95", "p99", "longest"],
        [[r.part, f"{r.mean:.1f}", r.p50, r.p90, r.p95, r.p99, r.longest] for r in audit.lengths],
    )
    if audit.labels is not None:
        yield ""
        yield (
            f"{counted(audit.labels.desirable, 'completion')} desirable, {audit.labels.undesirable:,} "
            "undesirable: to train with --loss-type kto"
        )
    bias = audit.length_bias
    if bias.longer_chosen is not None:
        yield ""
        yield (
            f"the longer completion wins {bias.longer_chosen:.1%} of {counted(bias.unequal_pairs, 'pair')} "
            "of unequal length"
        )
    if len(audit.sources) > 1 or audit.sources[0].source is not None:
        yield ""
        header = [
            "source",
            f"{audit.noun}s",
            "prompts",
            "duplicates",
            "contradictory",
            "longer wins",
            "median lengths",
        ]
        yield from table(
            header,
            [
                [
                    "none" if s.source is None else s.source,
                    s.pairs,
                    s.prompts,
                    s.duplicates,
                    s.contradictory,
                    "-" if s.length_bias.longer_chosen is None else f"{s.length_bias.longer_chosen:.1%}",
                    f"{s.median_prompt} + {s.median_chosen} / {s.median_rejected}",
                ]
                for s in audit.sources
            ],
        )
    if audit.truncation:
        yield ""
        yield from table(
            [f"--max-length ({audit.truncation_mode})", "whole", "cut", "left out", ""],
            [
                [t.max_length, t.whole, t.cut, sum(t.dropped.values()), _reasons(t.dropped)]
                for t in audit.truncation
            ],
        )
    if audit.estimate is not None:
        e = audit.estimate
        yield ""
        yield (
            f"scoring at --max-length {e.max_length}: {counted(e.sequences, 'distinct sequence')}, "
            f"{counted(e.tokens, 'token')}, {counted(e.shards, 'shard')}, {e.disk_gb:g} GB, "
            f"{e.gpu_hours:.3g} GPU hours"
        )
        yield f"  ({e.assumption})"
    yield from _reference(audit)


def _problem_lines(audit: Audit) -> Iterator[str]:
    if not audit.problems:
        yield "no problem found"
    for problem in audit.problems:
        # Titles are of several; the count behind them is right for one and for none, too.
        count = f": {problem.count:,}" if problem.count else ""
        yield f"{_SIGNS[problem.severity]} {problem.title}{count} [{problem.kind}]"
        yield f"        why: {problem.why}"
        yield f"        fix: {problem.fix}"
        for example in problem.examples[:_EXAMPLES]:
            yield f"        {example.where}: {example.detail}"


def _reference(audit: Audit) -> Iterator[str]:
    found = audit.reference
    if found is None:
        return
    bounds = found.ranking_accuracy_interval
    interval = "" if bounds is None else f" (95%: {bounds[0]:.1%} to {bounds[1]:.1%})"
    yield ""
    yield (
        f"the reference itself ranks {found.ranking_accuracy:.1%}{interval} of "
        f"{counted(found.pairs, 'pair')} as labelled, {found.normalised_ranking_accuracy:.1%} per token"
    )
    quantiles = ", ".join(f"{name} {value:+.1f}" for name, value in found.margin_quantiles.items())
    yield f"its log-prob of chosen minus rejected, in nats: {quantiles}"
    if len(found.sources) > 1:
        rows = [
            [s.source or "none", s.pairs, f"{s.ranking_accuracy:.1%}", f"{s.mean_ranking_margin:+.1f}"]
            for s in found.sources
        ]
        yield from table(["source", "pairs", "as labelled", "mean nats"], rows)
    yield "hardest to flip (row, nats, beginnings of chosen and rejected):"
    for pair in found.hardest:
        chosen, rejected = (" ".join(text.split())[:50] for text in (pair.chosen, pair.rejected))
        yield f"  {pair.row:>8}  {pair.ranking_margin:+9.1f}  {chosen!r} | {rejected!r}"


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())
