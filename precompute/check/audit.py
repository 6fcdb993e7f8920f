"""``dpo-opt check``: everything that is wrong or suspicious in preference data, before any GPU time.

One pass over the data gathers ``Facts``; all that is said here is worked out from those arrays.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_opt.precompute.check.flags import ODD_ENDS, Flag
from dpo_opt.precompute.check.forecast import (
    estimate,
    forecast,
    forecast_lengths,
    kept_pairs,
    lengths_that_cut_prompts,
)
from dpo_opt.precompute.check.labels import label_counts, label_problems
from dpo_opt.precompute.check.length_bias import biased, length_bias
from dpo_opt.precompute.check.openings import shared_openings
from dpo_opt.precompute.check.pair_statistics import (
    EXAMPLES,
    NO_COMPLETION,
    BadRows,
    Facts,
    Wanted,
    collect,
)
from dpo_opt.precompute.check.problems import (
    FOUND,
    LEAVES_NOTHING,
    MERGED_TURNS,
    by_harm,
    of_rows,
    problem,
    without_skipping,
)
from dpo_opt.precompute.check.repeats import find_repeats, near_repeats
from dpo_opt.precompute.check.summaries import data_sources, lengths_of, percentiles, source_counts
from dpo_opt.precompute.config import CheckConfig, Truncation
from dpo_opt.precompute.read.sources import Source, find_sources, merged_splits
from dpo_opt.precompute.tokens.max_length import resolve_max_length
from dpo_opt.precompute.tokens.mismatched import NO_OTHER_PROMPT
from dpo_opt.precompute.tokens.template_date import ChosenDate, chosen_date
from dpo_opt.precompute.tokens.tokenize import encoder
from dpo_opt.schemas.audit_record import (
    Audit,
    Example,
    Problem,
    TruncationForecast,
)
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.models import context_length, find_model
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.weights import parameter_count

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

_FLAG_KINDS: dict[str, int] = {
    "merged": Flag.MERGED,
    "earlier_thought": Flag.EARLIER_THOUGHT,
    "special_token": Flag.SPECIAL_TOKEN,
    "blank_completion": Flag.BLANK_COMPLETION,
    "repeated_prompt": Flag.REPEATED_PROMPT,
    "short_prompt": Flag.SHORT_PROMPT,
    "empty_turn": Flag.EMPTY_TURN,
    "answered_prompt": Flag.ANSWERED_PROMPT,
    "control_character": Flag.CONTROL_CHARACTER,
    "negative_margin": Flag.NEGATIVE_MARGIN,
    "zero_margin": Flag.ZERO_MARGIN,
    **ODD_ENDS,
}
_LEAST_WITH_ONE_COMPLETION = 10  # pairs
_LEAST_WITH_ONE_PROMPT = 4  # three ranked completions make three of them


def audit(
    config: CheckConfig,
    *,
    progress: Progress | None = None,
    count_parameters: Callable[[Path], int] = parameter_count,
) -> Audit:
    """Read all data once and say what is wrong with it.

    Args:
        config: The data, and the model whose tokens are counted.
        progress: Told of every pair.
        count_parameters: Of the model in a folder; by default its weights must be there.

    Raises:
        ConfigError: The sources cannot be what is meant, or the model's tokenizer cannot be used.
        DataError: A source does not exist.
    """
    progress = progress or Silent()
    folder = None if config.model is None else find_model(config.model, weights=False)
    date = (
        ChosenDate(None, None)
        if folder is None
        else chosen_date(encoder(folder).tokenizer, given=config.template_date, shards=config.shards)
    )
    cut_to = lengths_that_cut_prompts(config, folder)
    wanted = Wanted(folder, config.near_duplicates, config.train_on, date.date, cut_to)
    named = find_sources(config)
    facts = collect(config, wanted, processes=config.processes, progress=progress)
    problems = _bad_rows(facts, skipped=config.on_bad_row == "skip")
    problems += _merged(named)
    problems += _flagged(facts)
    problems += _repeated(facts)
    problems += _one_text(facts)
    problems += shared_openings(facts)
    problems += _weightless(facts)
    problems += label_problems(facts)
    if config.near_duplicates:
        problems += _nearly_repeated(facts, similarity=config.similarity)
    if config.eval_data:
        problems += _shared_with_eval(facts, config, progress)
    bias = length_bias(lengths_of(facts))
    sources = source_counts(facts)
    problems += biased(bias, sources)
    if not len(facts):
        problems.append(problem("no_pairs", 0, []))
    report = Audit(
        data=data_sources(facts, named),
        pairs=len(facts),
        problems=[],
        unit="tokens" if facts.tokens.shape[1] else "characters",
        lengths=percentiles(facts),
        length_bias=bias,
        sources=sources,
        labels=label_counts(facts),
        template_date=date.date,
        template_date_from=date.origin,
    )
    if folder is not None and len(facts):
        problems += _forecast(report, facts, config, folder, cut_to, parameters=count_parameters(folder))
    report.problems = by_harm(problems if report.noun == "pair" else list(map(of_rows, problems)))
    return report


def _examples(facts: Facts, pairs: Indices, detail: Callable[[int], str]) -> list[Example]:
    return [Example(where=facts.places[int(i)], detail=detail(int(i))) for i in pairs[:EXAMPLES]]


def _bad_rows(facts: Facts, *, skipped: bool) -> list[Problem]:
    kinds: dict[str, BadRows] = {}
    for (_, kind), (count, examples) in facts.bad_rows.items():
        before = kinds.get(kind, BadRows(0, []))
        kinds[kind] = BadRows(before.rows + count, [*before.examples, *examples][:EXAMPLES])
    return [
        problem(
            kind,
            count,
            [Example(where=where, detail=what) for where, what in examples],
            skipped=skipped,
            fix=None if len(facts) else without_skipping(kind),
        )
        for kind, (count, examples) in kinds.items()
    ]


def _flagged(facts: Facts) -> list[Problem]:
    problems = []
    for kind, flag in _FLAG_KINDS.items():
        pairs = np.flatnonzero(facts.flags & flag)
        if len(pairs):
            of_turns = kind == "merged" and all("message" in facts.forms[s] for s in set(facts.source[pairs]))
            examples = _examples(facts, pairs, lambda i: _shape_of(facts, i))
            problems.append(problem(kind, len(pairs), examples, fix=MERGED_TURNS if of_turns else None))
    return problems


def _shape_of(facts: Facts, pair: int) -> str:
    prompt, chosen, rejected = facts.characters[pair]
    if facts.desirable[pair] or facts.undesirable[pair]:
        return f"prompt of {prompt}, completion of {chosen} characters"
    return f"prompt of {prompt}, chosen of {chosen}, rejected of {rejected} characters"


def _repeated(facts: Facts) -> list[Problem]:
    repeats = find_repeats(facts)
    found = {
        "duplicate": np.flatnonzero(repeats.earlier < np.arange(len(facts))),
        "contradictory": np.flatnonzero(repeats.opposite >= 0),
        "identical_completions": np.flatnonzero(facts.chosen == facts.rejected),
    }
    details: dict[str, Callable[[int], str]] = {
        "duplicate": lambda i: f"the same as {facts.places[int(repeats.earlier[i])]}",
        "contradictory": lambda i: f"the other way round in {facts.places[int(repeats.opposite[i])]}",
        "identical_completions": lambda i: f"{facts.characters[i, 1]} characters, twice",
    }
    removed = len(np.unique(np.concatenate(list(found.values()))))
    fix = LEAVES_NOTHING if removed == len(facts) else None
    return [
        problem(kind, len(pairs), _examples(facts, pairs, details[kind]), fix=fix)
        for kind, pairs in found.items()
        if len(pairs)
    ]


def _one_text(facts: Facts) -> list[Problem]:
    """The prompt of more than half of the pairs, and a completion of nearly all."""
    parts = (
        ("shared_prompt", facts.prompt, 0.5, _LEAST_WITH_ONE_PROMPT),
        ("shared_chosen", facts.chosen, 0.9, _LEAST_WITH_ONE_COMPLETION),
        ("shared_rejected", facts.rejected, 0.9, _LEAST_WITH_ONE_COMPLETION),
    )
    problems = []
    for kind, hashes, share, least in parts:
        if len(facts) < least:
            continue
        # A value that more than half of the pairs have is their median.
        (median,) = np.partition(hashes, len(hashes) // 2)[[len(hashes) // 2]]
        if median == NO_COMPLETION:
            continue
        pairs = np.flatnonzero(hashes == median)
        if len(pairs) > share * len(facts):
            examples = _examples(facts, pairs, lambda i: _shape_of(facts, i))
            problems.append(problem(kind, len(pairs), examples))
    return problems


def _weightless(facts: Facts) -> list[Problem]:
    if not len(facts) or not (facts.flags & Flag.NO_WEIGHT).all():
        return []
    examples = _examples(facts, np.arange(len(facts)), lambda i: _shape_of(facts, i))
    return [problem("no_weight", len(facts), examples)]


def _nearly_repeated(facts: Facts, *, similarity: float) -> list[Problem]:
    earlier = near_repeats(facts, similarity=similarity)
    if not earlier:
        return []
    pairs = np.array(sorted(earlier))
    examples = _examples(facts, pairs, lambda i: f"nearly the same as {facts.places[earlier[i]]}")
    return [problem("near_duplicate", len(pairs), examples)]


def _shared_with_eval(facts: Facts, config: CheckConfig, progress: Progress) -> list[Problem]:
    held_out = collect(
        config.model_copy(update={"data": config.eval_data, "data_share": []}),
        Wanted(),
        processes=config.processes,
        progress=progress,
    )
    problems = _bad_rows(held_out, skipped=config.on_bad_row == "skip")
    pairs = np.flatnonzero(np.isin(facts.prompt, held_out.prompt))
    if len(pairs):
        first_with = dict(zip(held_out.prompt[::-1].tolist(), range(len(held_out) - 1, -1, -1), strict=True))
        examples = _examples(
            facts,
            pairs,
            lambda i: f"the prompt of {held_out.places[first_with[int(facts.prompt[i])]]}",
        )
        problems.append(problem("shared_with_eval", len(pairs), examples))
    return problems


def _merged(named: Sequence[Source]) -> list[Problem]:
    found = [(source.name, merged_splits(source)) for source in named]
    examples = [
        Example(
            where=name, detail=", ".join(f"{split}: --data {quoted(own)}" for split, own in splits.items())
        )
        for name, splits in found
        if splits
    ]
    return [problem("merged_splits", len(examples), examples[:EXAMPLES])] if examples else []


def _forecast(
    report: Audit,
    facts: Facts,
    config: CheckConfig,
    folder: Path,
    cut_to: tuple[int, ...],
    *,
    parameters: int,
) -> list[Problem]:
    """Write the forecasts into the report; the problems among them."""
    max_length, truncation = resolve_max_length(folder, config.max_length), config.truncation
    others = None if report.labels is None else facts.other_prompts(cut_to, config.pairs_per_shard)
    fits = [
        forecast(facts.tokens, max_length=length, truncation=truncation, others=others)
        for length in forecast_lengths(facts.tokens, max_length, context=context_length(folder))
    ]
    report.truncation_mode = truncation
    report.truncation = fits
    report.estimate = estimate(
        facts,
        max_length=max_length,
        truncation=truncation,
        parameters=parameters,
        pairs_per_shard=config.pairs_per_shard,
        others=others,
    )
    at_max_length = next(fit for fit in fits if fit.max_length == max_length)
    kept, _ = kept_pairs(facts.tokens, max_length=max_length, truncation=truncation, others=others)
    return _forecast_problems(facts, at_max_length, truncation, kept)


def _forecast_problems(
    facts: Facts, fit: TruncationForecast, truncation: Truncation, kept: Mask
) -> list[Problem]:
    prompt, longest = facts.tokens[:, 0], facts.tokens[:, 1:3].max(axis=1)
    if not fit.whole and not fit.cut:
        reason = max(fit.dropped, key=lambda key: fit.dropped[key])
        kind = f"all_{reason}" if f"all_{reason}" in FOUND else "nothing_fits"
        counts = ", ".join(f"{count} {reason}" for reason, count in fit.dropped.items())
        return [problem(kind, len(facts), [Example(where=f"--max-length {fit.max_length}", detail=counts)])]
    too_long = prompt + longest > fit.max_length
    fits, _ = kept_pairs(facts.tokens, max_length=fit.max_length, truncation=truncation)
    usable, of_themselves = kept_pairs(
        facts.tokens, max_length=int((prompt + longest).max()) + 1, truncation=truncation
    )
    problems = []
    pairs = np.flatnonzero(facts.tokens[:, [0, 1, 2]].min(axis=1) == 0)
    if len(pairs):
        examples = _examples(facts, pairs, lambda i: _shape_of(facts, i))
        problems.append(problem("no_token", len(pairs), examples))
    pairs = np.flatnonzero(fits & ~kept)
    if len(pairs):
        examples = _examples(facts, pairs, lambda i: _shape_of(facts, i))
        problems.append(problem(NO_OTHER_PROMPT, len(pairs), examples))
    pairs = np.flatnonzero(usable & ~fits)
    if len(pairs):
        of_others = {*of_themselves, NO_OTHER_PROMPT}
        by_length = {key: n for key, n in fit.dropped.items() if key not in of_others}
        reasons = ", ".join(f"{count} {reason}" for reason, count in by_length.items())
        summary = Example(where=f"--max-length {fit.max_length}", detail=reasons)
        examples = _examples(
            facts,
            pairs,
            lambda i: f"prompt of {prompt[i]}, completion of {counted(int(longest[i]), 'token')}",
        )
        problems.append(problem("left_out", len(pairs), [summary, *examples][:EXAMPLES]))
    if fit.cut:
        pairs = np.flatnonzero(kept & too_long)
        examples = _examples(
            facts,
            pairs,
            lambda i: f"{counted(int(prompt[i] + longest[i]), 'token')}, {fit.max_length} of them kept",
        )
        problems.append(problem("cut", fit.cut, examples))
    return problems
