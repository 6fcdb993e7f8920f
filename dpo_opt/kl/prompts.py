"""The prompts that a policy is sampled at: those held out from its run, or those of shards or a file."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dpo_opt.analysis.run_files import shards_of_run
from dpo_opt.analysis.run_settings import read_run_config
from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import read_prompts
from dpo_opt.precompute.tokens.template_date import ChosenDate, chosen_date
from dpo_opt.precompute.tokens.tokenize import PairTokenizer, encoder, prompt_ids
from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.pairs import IdArray, PreferencePair
from dpo_opt.schemas.run_layout import CONFIG
from dpo_opt.schemas.shard_folder import ShardFolder

if TYPE_CHECKING:
    from dpo_opt.commands.kl import KLConfig

T = TypeVar("T")


def choose_prompts(config: "KLConfig", *, model: Path, run: Path | None) -> tuple[ChosenDate, list[IdArray]]:
    """Distinct prompts, spread evenly over those there are, and the date that they were rendered with.

    Args:
        config: Where they come from, and how many.
        model: Folder of the policy, whose tokenizer a file's prompts get.
        run: The run that made the policy: without ``prompts``, those that it held out are taken.

    Raises:
        ConfigError: The run held out no prompts, or a date is given where it has no effect.
        DataError: The prompts cannot be read.
    """
    if config.prompts is None:
        assert run is not None
        return _of_shards(*_held_out(run), count=config.num_prompts)
    if config.prompts.is_dir():
        if config.template_date is not None:
            raise ConfigError(
                "--template-date is given for prompts that are ids already",
                where=str(config.prompts),
                why="shards are rendered with the date of their folder",
                fix="leave --template-date out",
            )
        return _of_shards(config.prompts, 1.0, count=config.num_prompts)
    data = DataConfig(data=[str(config.prompts)], column=config.column, ignore_column=config.ignore_column)
    date = chosen_date(encoder(model).tokenizer, given=config.template_date, shards=_trained_on(model))
    found = {ids.tobytes(): ids for ids in _ids_of_prompts(data, encoder(model, date.date))}
    return date, _spread(list(found.values()), config.num_prompts)


def _held_out(run: Path) -> tuple[AnyPath, float]:
    """A folder of shards, and the share of its prompts that the run was not trained on.

    Raises:
        ConfigError: There are none.
    """
    settings = read_run_config(run)
    share, others = settings.get("eval_split"), settings.get("eval_shards")
    if isinstance(share, float) and share > 0:
        return shards_of_run(run), share
    if isinstance(others, list) and others:
        return location(str(others[0])), 1.0
    raise ConfigError(
        "the run held out no prompts (it has neither eval_split nor eval_shards)",
        where=str(run),
        why="a policy writes otherwise where it was trained than elsewhere",
        fix="pass --prompts; the shards that it was trained on say how far it moved there",
    )


def _of_shards(path: AnyPath, share: float, *, count: int) -> tuple[ChosenDate, list[IdArray]]:
    from dpo_opt.optimize.stream import PairStream

    folder = ShardFolder.open(path)
    date = ChosenDate(folder.manifest.fingerprint.template_date, quoted(path))
    stream = PairStream(folder, eval_split=share)
    # One pair of each prompt, so that only these pairs are read.
    prompts = folder.index(["prompt_id"])["prompt_id"].take(stream.eval_positions).to_numpy()
    first = sorted(np.unique(prompts, return_index=True)[1].tolist())
    positions = stream.eval_positions[_spread(first, count)]
    with contextlib.closing(stream.batches(positions, 64)) as batches:
        return date, [pair.prompt_ids for batch in batches for pair in batch]


def _trained_on(model: Path) -> AnyPath | None:
    """The shards of the run that the policy is the result of, where both are there."""
    for run in model.absolute().parents[:2]:
        if (run / CONFIG).is_file():
            # Moved away with the run's other inputs: the result says which date was taken.
            with contextlib.suppress(ConfigError):
                return shards_of_run(run)
    return None


def _ids_of_prompts(data: DataConfig, tokenizer: PairTokenizer) -> Iterator[IdArray]:
    """Ids of each row's prompt: those that ``precompute`` gives it where the row is a pair."""
    for row in read_prompts(data):
        if isinstance(row, PreferencePair):
            (whole,) = tokenizer.encode([row])
            if isinstance(whole, DataError):
                raise whole
            yield whole.prompt
        else:
            yield prompt_ids(
                row.prompt,
                tokenizer.tokenizer,
                where=row.where,
                date=tokenizer.template_date,
                tools=row.tools,
                row_settings=row.chat_template_kwargs,
            )


def _spread(values: Sequence[T], count: int) -> list[T]:
    chosen = np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))
    return [values[i] for i in chosen]
