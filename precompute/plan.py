"""What a folder is going to hold, fixed before anything is scored.

Planning reads every row once, so a malformed row is found before any GPU time is spent, and nothing is
written until at least one pair is known to survive tokenization.
"""

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_opt.precompute.blocks import Block
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.datasets import (
    BadFile,
    BadRow,
    Reading,
    parse_block,
    row_digest,
    scan_blocks,
    scan_pairs,
)
from dpo_opt.precompute.parallel import map_in_order
from dpo_opt.precompute.templates import chat_template
from dpo_opt.precompute.tokenize import TEXT_TO_IDS, PairTokenizer, load_tokenizer, model_vocab_size
from dpo_opt.precompute.weights_memo import known_weights_digest, remember_weights, weight_files
from dpo_opt.schemas.columns import COLUMNS, MARGIN, WEIGHT, Column, new_column, write_column
from dpo_opt.schemas.errors import ConfigError, DataError, FingerprintError
from dpo_opt.schemas.fingerprint import ALL_FIELDS, Fingerprint, refuse_differences
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, sizes
from dpo_opt.schemas.manifest import COMMAND, COMMITS, PLAN, TOKENIZER, Plan, ShardRange, parse, to_json
from dpo_opt.schemas.models import (
    checkpoint_dtype,
    config_digest,
    context_length,
    find_model,
    template_digest,
    tokenizer_digest,
)
from dpo_opt.schemas.pairs import Numerics, TokenizedPair
from dpo_opt.schemas.shards import SCHEMA_VERSION
from dpo_opt.schemas.storage import settle_folder, write_text

_DEFAULT_MAX_LENGTH = 1024


class Reference(NamedTuple):
    """The model that scores, with what was left to it resolved."""

    folder: Path
    dtype: str
    max_length: int


def resolve_reference(config: PrecomputeConfig) -> Reference:
    """Find the model and fill in the settings that depend on it.

    Raises:
        ConfigError: There is no such model, or ``max_length`` is beyond its context.
    """
    folder = find_model(config.model)
    dtype = checkpoint_dtype(folder) if config.dtype == "auto" else config.dtype
    return Reference(folder, dtype, resolve_max_length(folder, config.max_length))


def resolve_max_length(folder: Path, max_length: int | None) -> int:
    """The most tokens of prompt plus completion, where it was left to the model too.

    Raises:
        ConfigError: It is beyond the model's context.
    """
    context = context_length(folder)
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(
            f"--max-length {max_length} is beyond the model's context of {context} tokens",
            where=str(folder),
            why="log-probs past the context mean nothing",
            fix=f"pass --max-length {context} or less",
        )
    return max_length or min(_DEFAULT_MAX_LENGTH, context or _DEFAULT_MAX_LENGTH)


def make_tokenizer(config: PrecomputeConfig, reference: Reference) -> PairTokenizer:
    """The tokenizer with this configuration's truncation.

    Raises:
        ConfigError: The model folder has no usable tokenizer, or does not say how many ids there are.
    """
    return PairTokenizer(
        load_tokenizer(reference.folder),
        max_length=reference.max_length,
        truncation=config.truncation,
        vocab_size=model_vocab_size(reference.folder),
    )


class Planned(NamedTuple):
    """A plan, and what the data says about its rows beside their texts."""

    plan: Plan
    known_digest: str | None
    """Digest of the rows that the folder's own plan counts; None where the data has no more than these."""
    columns: dict[str, Column]
    """``weight`` and ``margin``, where some row has one."""
    bad_rows: list[BadRow]
    """Rows that are left out; empty unless ``on_bad_row`` is ``skip``. At most ``_BAD_ROWS_SHOWN``."""
    earlier: Sequence[Plan] = ()
    """The folder's plans when this one was made."""


_BAD_ROWS_SHOWN = 5


def make_plan(
    config: PrecomputeConfig, *, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Planned:
    """Count and digest the rows, and divide them into shards; where the folder grew, a shard begins anew.

    Raises:
        DataError: A row is malformed, or no pair survives tokenization.
    """
    earlier = read_plans(config.shards)
    grown_at = [plan.rows for plan in earlier]
    known_digest = None
    _require_a_usable_pair(config, reference, tokenizer)
    size = config.pairs_per_shard
    whole = hashlib.sha256()
    parts: list[RowsDigest] = []
    starts: list[int] = []
    rows = began = 0
    columns: dict[str, Column] = {}
    bad_rows: list[BadRow] = []
    for block in map_in_order(_read_block, _good_blocks(config), processes=config.processes):
        for found in block:
            if isinstance(found.error, DataError):
                if config.on_bad_row == "error":
                    raise found.error
                if len(bad_rows) < _BAD_ROWS_SHOWN:
                    bad_rows.append(BadRow(rows, found.error))
            if rows in grown_at:
                began = rows
                known_digest = whole.hexdigest() if rows == grown_at[-1] else None
            if (rows - began) % size == 0:
                starts.append(rows)
                parts.append(RowsDigest())
            parts[-1].add(found.digest)
            for name, value in found.numbers.items():
                column = columns.setdefault(name, new_column())
                column.rows.append(rows)
                column.values.append(value)
            whole.update(found.digest)
            rows += 1
    plan = Plan(
        fingerprint=_fingerprint(config, reference, tokenizer, numerics),
        dataset_digest=whole.hexdigest(),
        rows=rows,
        shards=[
            ShardRange(shard=i, start=start, stop=stop, rows_digest=part.hexdigest())
            for i, ((start, stop), part) in enumerate(
                zip(itertools.pairwise([*starts, rows]), parts, strict=True)
            )
        ],
    )
    return Planned(plan, known_digest, columns, bad_rows, earlier)


def settle_plan(
    config: PrecomputeConfig, *, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Plan:
    """The folder's plan, made here or by another run for the same thing.

    One of several workers that finds a plan does not read all data again: it compares the rows of each shard
    with the plan when it reads them.

    Raises:
        DataError: A row is malformed, no pair survives tokenization, or the plan is gone.
        FingerprintError: The folder was planned for something else.
    """
    if config.worker_index is not None and not config.append and is_file(config.shards / PLAN):
        plan = read_plan(config.shards)
        _refuse_other_fingerprint(plan, _fingerprint(config, reference, tokenizer, numerics), config.shards)
        return plan
    files = weight_files(reference.folder)
    planned = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics)
    adopt_plan(config, planned, tokenizer.tokenizer)
    remember_weights(config.shards, digest=planned.plan.fingerprint.weights, files=files)
    return planned.plan


class RowsDigest:
    """SHA-256 of the digests of rows, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row_digest: bytes) -> None:
        self._digest.update(row_digest)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _RowFacts(NamedTuple):
    digest: bytes
    numbers: dict[str, float]
    error: DataError | None


def _read_block(task: tuple[Block, Reading]) -> list[_RowFacts]:
    facts = []
    for item in parse_block(*task):
        if isinstance(item, BadRow):
            facts.append(_RowFacts(row_digest(item), {}, item.error))
        else:
            numbers = {WEIGHT: item.weight, MARGIN: item.margin}
            known = {name: value for name, value in numbers.items() if value is not None}
            facts.append(_RowFacts(row_digest(item), known, None))
    return facts


def _good_blocks(config: PrecomputeConfig) -> Iterator[tuple[Block, Reading]]:
    for item in scan_blocks(config):
        if isinstance(item, BadFile):
            raise item.error
        yield item


def _require_a_usable_pair(config: PrecomputeConfig, reference: Reference, tokenizer: PairTokenizer) -> None:
    reasons: Counter[str] = Counter()
    for item in scan_pairs(config):
        if isinstance(item, BadRow):
            if config.on_bad_row == "error":
                raise item.error
            reasons["bad_row"] += 1
            continue
        tokenized = tokenizer(item)
        if isinstance(tokenized, TokenizedPair):
            return
        reasons[tokenized.reason] += 1
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    raise DataError(
        f"none of the {reasons.total()} pairs can be used ({counts})",
        where=", ".join(config.data),
        why=f"at --max-length {reference.max_length} nothing would be left to train on",
        fix="pass a larger --max-length, or --truncation keep_end",
    )


def adopt_plan(config: PrecomputeConfig, planned: Planned, tokenizer: Any) -> None:
    """Write the plan and the columns beside it, or check that the folder already follows it.

    Raises:
        DataError: The folder holds shards, but no plan that says what they are of.
        FingerprintError: The folder was planned for something else, or for the first of these rows only.
    """
    shards_dir = config.shards
    new, earlier = planned.plan, planned.earlier
    # Asked first: whoever commits has written the plan before.
    holds_commits = any(name.endswith(".json") for name in sizes(shards_dir / COMMITS))
    plans = read_plans(shards_dir)
    if plans:
        _refuse_other_fingerprint(plans[-1], new.fingerprint, shards_dir)
    elif holds_commits:
        raise DataError(
            f"the folder holds scored shards, but no {PLAN}",
            where=str(shards_dir),
            why="nothing says which data they belong to",
            fix=f"restore {PLAN}, or pass another --shards folder",
        )
    if len(plans) == len(earlier):
        if not plans:
            _write_plan(config, planned, PLAN, tokenizer)
        elif new.rows > plans[-1].rows and planned.known_digest == plans[-1].dataset_digest:
            _require_growth(config, plans[-1], new)
            _write_plan(config, planned, f"plan-{len(plans)}.json")
    # Another planner may have been first.
    plans = read_plans(shards_dir)
    existing = plans[-1] if plans else new
    _refuse_other_fingerprint(existing, new.fingerprint, shards_dir)
    if existing != new:
        raise _other_plan(existing, new, shards_dir, planned_meanwhile=len(plans) > len(earlier))
    # One that is there may be somebody's own by now; one that was removed is taken from the data again.
    _write_columns(shards_dir, planned, keep=sizes(shards_dir / COLUMNS))


def _write_columns(shards_dir: AnyPath, planned: Planned, *, keep: Iterable[str] = ()) -> None:
    known = planned.earlier[-1].rows if planned.earlier else 0
    for name, column in planned.columns.items():
        if f"{name}.parquet" not in keep:
            write_column(shards_dir, name, column, keep_rows=known)


def _write_plan(config: PrecomputeConfig, planned: Planned, name: str, tokenizer: Any = None) -> None:
    """Write a plan where there is none of that name, after what belongs to it."""

    def write_companions() -> None:
        if tokenizer is not None:
            with settle_folder(config.shards / TOKENIZER) as private:
                tokenizer.save_pretrained(private)
        _write_columns(config.shards, planned)
        write_text(config.shards / COMMAND, _command(config))

    write_companions()
    with contextlib.suppress(FileExistsError):
        write_text(config.shards / name, to_json(planned.plan), replace=False)
        # Another planner may have written its own, before it found this plan and gave up.
        write_companions()


def _require_growth(config: PrecomputeConfig, last: Plan, new: Plan) -> None:
    """Whether the next plan's first shards are those of the last one, and somebody asked for it.

    Raises:
        FingerprintError: One of the two is not so.
    """
    if new.shards[: len(last.shards)] != last.shards:
        raise _other_plan(last, new, config.shards)
    if not config.append:
        raise FingerprintError(
            f"the data has grown from {last.rows} to {new.rows} rows since the folder was planned",
            where=str(config.shards),
            why="its first rows are those that the folder holds",
            fix="pass --append to score the new rows only, or another --shards folder",
        )


def _other_plan(
    existing: Plan, plan: Plan, shards_dir: AnyPath, *, planned_meanwhile: bool = False
) -> FingerprintError:
    different = (
        f"its data has {existing.rows} rows with digest {existing.dataset_digest[:16]}..., this data "
        f"{plan.rows} rows with digest {plan.dataset_digest[:16]}..."
        if existing.shards[0].stop == plan.shards[0].stop
        or existing.rows <= min(existing.shards[0].stop, plan.shards[0].stop)
        else f"its shards hold {existing.shards[0].stop} rows, --pairs-per-shard now gives "
        f"{plan.shards[0].stop}"
    )
    return FingerprintError(
        f"the folder was planned for another run: {different}",
        where=str(shards_dir),
        why="its shards would not belong together",
        fix="another run planned it meanwhile: run the same command again once that one is finalized"
        if planned_meanwhile
        else _OTHER_FOLDER,
    )


_OTHER_FOLDER = "pass another --shards folder, or remove this one to score it again"


def _refuse_other_fingerprint(plan: Plan, current: Fingerprint, shards_dir: AnyPath) -> None:
    refuse_differences(
        cached=plan.fingerprint, current=current, fields=ALL_FIELDS, where=str(shards_dir), fix=_OTHER_FOLDER
    )


def _command(config: PrecomputeConfig) -> str:
    """The settings as a file that ``--config`` reads, for whoever goes on with the folder."""
    # Who runs the workers is not theirs to know: each would launch again.
    launching = {"launcher", "gpus_per_worker", "submit", "job_option", "time_limit", "ray_address", "append"}
    settings = config.model_dump(
        mode="json", exclude={"worker_index", "num_workers", *launching}, exclude_defaults=True
    )
    settings["shards"] = str(config.shards.absolute())
    # What is no path here is a URL, a pattern or a name on the Hub.
    settings["data"] = [_absolute(name) for name in config.data]
    settings["model"] = _absolute(config.model)
    return yaml.safe_dump(settings, sort_keys=False)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def read_plans(shards_dir: AnyPath) -> list[Plan]:
    """The folder's plans, one for each time it grew; each holds the shards of the one before."""
    names = sizes(shards_dir)
    wanted = [PLAN, *(f"plan-{i}.json" for i in range(1, len(names)))]
    found = list(itertools.takewhile(lambda name: name in names, wanted))
    texts = read_all(shards_dir, found).items()
    return [parse(Plan, text, where=shards_dir / name) for name, text in texts]


def read_plan(shards_dir: AnyPath) -> Plan:
    """The plan that counts now.

    Raises:
        DataError: There is none.
    """
    plans = read_plans(shards_dir)
    if not plans:
        raise DataError(
            f"there is no {PLAN}",
            where=str(shards_dir),
            why="this is not a folder of reference shards",
            fix=f"dpo-opt precompute --model M --data DATA --shards {shards_dir}",
        )
    return plans[-1]


def _fingerprint(
    config: PrecomputeConfig, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Fingerprint:
    return Fingerprint(
        schema_version=SCHEMA_VERSION,
        weights=known_weights_digest(reference.folder, config.shards),
        model_config_digest=config_digest(reference.folder),
        tokenizer=tokenizer_digest(tokenizer.tokenizer),
        chat_template=template_digest(chat_template(tokenizer.tokenizer)),
        text_to_ids=TEXT_TO_IDS,
        max_length=reference.max_length,
        truncation=config.truncation,
        **numerics._asdict(),
    )
