"""DPO on human-labelled pairs, judged as in the DPO paper (Rafailov et al. 2023, section 6.2 and 6.3).

    python run.py --data PAIRS --model MODEL --output FOLDER [--size tiny] [-- JUDGE OPTIONS]

PAIRS is whatever `dpo-opt precompute` reads: HH-RLHF's transcripts, a set of summaries. It is cleaned and
divided by prompt, scored once and trained on. Then come reward accuracy and displacement on the held-out
pairs, KL, and win rates against the completions that people chose: of the policy and of the reference at each
temperature, and of Best-of-N. The options of the judge are those of `dpo-opt judge`, such as `--judge-model
NAME --endpoint URL`; without them it is a word list, of which no win rate means anything.

The judge compares two completions before anything is trained. Each finished step is kept: the same command
continues where it was stopped, and with another judge it only judges anew.
"""

import itertools
import json
from pathlib import Path

import click
import yaml
from best_of_n import best_of_n
from folders import Work, begin, dpo_opt
from results import HeldOut, held_out_pairs, write_results
from settings import read_size
from win_rates import WinRate, completion_text, try_judge, win_rate, write_chosen

from dpo_opt.cli import main as cli
from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.storage import write_text
from dpo_opt.user_function import load_user_function

_WORD_LIST = ("--function", f"{Path(__file__).resolve().with_name('kindness.py')}:kindness")


_KEPT = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
"""Of a row: what the prompt is made of, and its completions."""


@click.command(help=__doc__)
@click.option("--data", required=True, help="Preference pairs: a file, a folder, or a Hub name.")
@click.option(
    "--column", multiple=True, metavar="PART=NAME", help="As of `dpo-opt convert`; may be repeated."
)
@click.option("--model", required=True, help="The reference, with which the policy begins.")
@click.option("--size", default="tiny", show_default=True, help="tiny, full, or a file of that form.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for everything.")
@click.argument("judge", nargs=-1, type=click.UNPROCESSED)
def main(
    data: str, column: tuple[str, ...], model: str, size: str, output: Path, judge: tuple[str, ...]
) -> None:
    """Run the experiment, or what is left of it."""
    try:
        work = Work(read_size(size), output.absolute(), model)
        find_model(model)
        require_judge(judge or _WORD_LIST)
        try_judge(work, judge or _WORD_LIST)
        begin(work, {"data": data, "column": list(column), "model": model})
        prepare(work, data, column)
        train(work)
        write_results(work, measure_pairs(work), measure_wins(work, judge or _WORD_LIST))
    except DpoOptError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    click.echo((work.folder / "results.md").read_text(encoding="utf-8"))


def require_judge(judge: tuple[str, ...]) -> None:
    """Refuse a judge that could not begin, before anything is trained.

    Raises:
        ConfigError: Its function cannot be loaded.
        UsageError: `dpo-opt judge` has no such options.
    """
    words = ["--samples", "samples", "--output", "judged", *judge]
    options = cli.commands["judge"].make_context("dpo-opt judge", words).params
    if options["function"] is not None:
        load_user_function(options["function"])


def prepare(work: Work, data: str, column: tuple[str, ...]) -> None:
    """Clean pairs, divided by prompt; the held-out prompts; the reference's log-probs of all pairs.

    Raises:
        ConfigError: Fewer prompts are held out than are to be completed.
    """
    size, pairs = work.size, work.folder / "pairs"
    if not pairs.is_dir():
        columns = [word for one in column for word in ("--column", one)]
        shares = ["--data-share", size.data_share, "--eval-split", size.eval_share]
        dpo_opt("convert", data, "--output", pairs, *columns, *shares)
    distinct: dict[str, dict[str, object]] = {}
    for line in (pairs / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if completion_text(row["chosen"]) is not None:
            distinct.setdefault(json.dumps(row["prompt"]), {name: row[name] for name in _KEPT if name in row})
    if len(distinct) < size.num_prompts:
        raise ConfigError(
            f"{len(distinct)} prompts whose chosen completion is text are held out, and "
            f"{size.num_prompts} are to be completed",
            where=str(pairs / "eval.jsonl"),
            fix="pass --size with a file of a larger eval_share, or of fewer num_prompts; and a new --output",
        )
    # The shortest: each must leave room for a completion in the model's context.
    shortest = itertools.islice(sorted(distinct, key=len), size.num_prompts)
    write_text(
        work.prompts, "".join(json.dumps(distinct[key], ensure_ascii=False) + "\n" for key in shortest)
    )
    for part in ("train", "eval"):
        length = ["--max-length", size.max_length, "--truncation", "drop", "--backend", size.backend]
        shards = work.folder / "shards" / part
        dpo_opt(
            "precompute",
            "--model",
            work.model,
            "--data",
            pairs / f"{part}.jsonl",
            "--shards",
            shards,
            *length,
        )


def train(work: Work) -> None:
    """The policy."""
    if work.policy.is_dir():
        return
    settings = work.folder / "train.yaml"
    write_text(settings, yaml.safe_dump(work.size.train))
    shards = ["--shards", work.folder / "shards" / "train", "--eval-shards", work.folder / "shards" / "eval"]
    run = work.folder / "run"
    resume = ["--resume"] if run.exists() else []
    dpo_opt("train", *shards, "--model", work.model, "--config", settings, "--output-dir", run, *resume)


def measure_pairs(work: Work) -> HeldOut:
    """Held-out pairs under the policy, and its KL on completions of its own."""
    scores, kl = (
        work.folder / "run" / "scores" / "held_out.parquet",
        work.folder / "run" / "kl" / "held_out.parquet",
    )
    if not scores.is_file():
        dpo_opt(
            "score", "--shards", work.folder / "shards" / "eval", "--model", work.policy, "--output", scores
        )
    if not kl.is_file():
        size = work.size
        many = ["--num-prompts", size.num_prompts, "--num-samples", size.kl_samples]
        how = ["--max-new-tokens", size.max_new_tokens, "--backend", size.backend]
        models = ["--model", work.policy, "--reference", work.model]
        dpo_opt("kl", *models, "--prompts", work.prompts, *many, *how, "--output", kl)
    return held_out_pairs(work, scores, kl)


def measure_wins(work: Work, judge: tuple[str, ...]) -> list[WinRate]:
    """Win rates against the chosen completions."""
    found = []
    for policy, model in (("reference", work.model), ("policy", work.policy)):
        for temperature in work.size.temperatures:
            name = f"{policy}-{temperature:g}"
            how = ["--num-samples", 1, "--temperature", temperature, "--backend", work.size.backend]
            files = ["--prompts", work.prompts, "--output", work.samples(name)]
            dpo_opt("sample", "--model", model, *files, *how, "--max-new-tokens", work.size.max_new_tokens)
            write_chosen(work, like=work.samples(name))
            found.append(win_rate(work, name, temperature, judge))
    return found + [win_rate(work, name, None, judge) for name in best_of_n(work)]


if __name__ == "__main__":
    main()
