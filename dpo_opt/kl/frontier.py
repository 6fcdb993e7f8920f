"""Rates the samples that ``dpo-opt kl`` took, and writes what reward each policy gets for its KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_opt.analysis.frontier import FrontierPoint, frontier_point, write_frontier
from dpo_opt.analysis.kl import KLFile, kl_of_run
from dpo_opt.analysis.run_files import distinct_names
from dpo_opt.analysis.run_settings import read_run_config
from dpo_opt.kl.rewards import make_rater
from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.kl_samples import read_kl_record
from dpo_opt.schemas.outputs import output_mark, require_own_output
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.run_layout import KL
from dpo_opt.schemas.storage import write_text
from dpo_opt.sweep.grid import run_folders

if TYPE_CHECKING:
    from dpo_opt.commands.frontier import FrontierConfig


def measure_frontier(config: "FrontierConfig", *, progress: Progress | None = None) -> list[FrontierPoint]:
    """Rate all samples of the runs, and write each run's table and the figure.

    Returns:
        The points, run by run, in the order of their steps.

    Raises:
        ConfigError: A run has no samples, or the settings name no reward.
        DataError: A table is damaged, or a sample gets no reward.
        FingerprintError: The reward model has another tokenizer than a run.
    """
    progress = progress or Silent()
    runs = list(dict.fromkeys(run for named in config.runs for run in run_folders(named)))
    if not runs:
        raise ConfigError("no run is named", fix="dpo-opt frontier RUN --reward-function FILE.py:NAME")
    if config.output is not None:
        require_own_output(config.output, option="--output", command="frontier")
    rater = make_rater(config)
    measured = {run: kl_of_run(run) for run in runs if read_run_config(run)}
    for run in runs:
        if not measured[run]:
            raise ConfigError(
                "no samples of this run's policies are there",
                where=str(run),
                why="reward and KL are taken from the policies' own samples",
                fix=f"dpo-opt kl {quoted(run)}",
            )
    _require_one_length(measured)
    progress.start("rating", total=sum(map(len, measured.values())), unit="tables")
    found = []
    for run, name in zip(runs, distinct_names(runs), strict=True):
        points = []
        for kl in measured[run]:
            rewards = rater.rate(run / KL / kl.file, run=run)
            points.append(frontier_point(run, kl, rewards, rated_by=rater.name, rated_by_sha256=rater.sha256))
            progress.advance(1)
        write_frontier(run, points)
        found += [point._replace(run=name) for point in points]
    progress.finish()
    if config.output is not None:
        from dpo_opt.analysis.figures.drawing import svg
        from dpo_opt.analysis.figures.frontier import frontier_figure

        figure = svg(frontier_figure(found), label="Mean reward against KL")
        write_text(config.output, f"<!-- {output_mark('frontier')} -->\n{figure}")
    return found


def _require_one_length(measured: Mapping[Path, Sequence[KLFile]]) -> None:
    """Refuse tables whose completions may have other lengths: their KL would not compare.

    Raises:
        DataError: Two differ.
    """
    tables = [
        (run / KL / kl.file, kl.estimate.prompts, record)
        for run, files in measured.items()
        for kl in files
        if (record := read_kl_record(run / KL / kl.file)) is not None
    ]
    others = [table for table in tables if table[2].max_new_tokens != tables[0][2].max_new_tokens]
    if others:
        (first, prompts, usual), (table, _, record) = tables[0], others[0]
        names = [quoted(other) for other, _, _ in others]
        runs = dict.fromkeys(quoted(other.parent.parent) for other, _, _ in others)
        # Other settings than those of the tables that stay would be refused by `kl`.
        again = (
            f"dpo-opt kl {' '.join(runs)} --num-prompts {prompts} --num-samples {usual.num_samples} "
            f"--max-new-tokens {usual.max_new_tokens} --seed {usual.seed} "
            f"--backend {'vllm' if usual.engine == 'vllm' else 'hf'}"
        )
        raise DataError(
            f"its completions have up to {record.max_new_tokens} tokens, those of {quoted(first)} up to "
            f"{usual.max_new_tokens}",
            where=str(table),
            why="a longer completion has more KL, so the policies do not compare",
            fix=f"rm {' '.join(names)}, then {again}",
        )
