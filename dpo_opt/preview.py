"""Pairs as the model will see them: what is context, what is scored, what was cut."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from dpo_opt.precompute.check.problems import FOUND
from dpo_opt.precompute.config import PreviewConfig
from dpo_opt.precompute.read.datasets import BadRow, scan_pairs
from dpo_opt.precompute.read.shared_prompt import common_prefix_length
from dpo_opt.precompute.tokens.ends import Ends
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer, model_vocab_size
from dpo_opt.precompute.tokens.max_length import resolve_max_length
from dpo_opt.precompute.tokens.template_date import ChosenDate, chosen_date
from dpo_opt.precompute.tokens.templates import chat_templates
from dpo_opt.precompute.tokens.tokenize import TEXT_TO_IDS, PairTokenizer
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.fingerprint import refuse_differences
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import load_manifest
from dpo_opt.schemas.models import find_model, template_digest, tokenizer_digest
from dpo_opt.schemas.pairs import IdArray, MaskArray, PreferencePair, TokenizedPair
from dpo_opt.schemas.safe_text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_STYLES = {
    "prompt": "dim",
    "chosen": "green",
    "rejected": "red",
    "context": "dim italic",
    "cut": "strike bright_black",
}


def preview(config: PreviewConfig) -> tuple[ChosenDate, list[dict[str, Any]]]:
    """The pairs from ``config.start`` on, divided into what each part of them is.

    Returns:
        The date that the chat template is told, and one entry per row: ``where``, and ``error``, or
        ``dropped`` (a reason or None), ``merged``, ``odd_ends`` (problems of ``check`` that are about the
        tokens at the ends) and, under ``chosen`` and ``rejected``, segments of ``kind`` (prompt, chosen,
        rejected, context, cut), ``ids`` and ``text``. A row of one completion has one of the two: chosen
        where it is desirable.

    Raises:
        ConfigError: The model's tokenizer cannot be used.
        DataError: A file cannot be read.
        FingerprintError: The model's tokenizer gives other ids than those of ``config.shards``.
    """
    folder = find_model(config.model, weights=False)
    tokenizer = load_tokenizer(folder)
    date = chosen_date(tokenizer, given=config.template_date, shards=config.shards)
    if config.shards is not None:
        config = _as_in(config.shards, config, tokenizer)
    pair_tokenizer = PairTokenizer(
        tokenizer,
        max_length=resolve_max_length(folder, config.max_length),
        truncation=config.truncation,
        train_on=config.train_on,
        vocab_size=model_vocab_size(folder),
        template_date=date.date,
    )
    ends = Ends(tokenizer, folder, added=pair_tokenizer.added)
    return date, list(_entries(config, pair_tokenizer, ends))


def _as_in(shards: AnyPath, config: PreviewConfig, tokenizer: "PreTrainedTokenizerFast") -> PreviewConfig:
    """The settings with the rules of a folder, whose ids the tokenizer gives."""
    cached = load_manifest(shards).fingerprint
    own = {
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": template_digest(chat_templates(tokenizer)),
        "text_to_ids": TEXT_TO_IDS,
    }
    refuse_differences(
        cached=cached,
        current=cached.model_copy(update=own),
        fields=own,
        where=str(shards),
        fix="pass the --model and the version of dpo-opt that the folder was scored with, or no --shards",
    )
    return PreviewConfig.model_validate(
        config.model_dump(exclude={"shards"})
        | {name: getattr(cached, name) for name in ("max_length", "truncation", "train_on")}
    )


def rendered(entries: list[dict[str, Any]], date: ChosenDate) -> Text:
    """The same for a terminal: no text of the data is taken for markup or control codes."""
    legend = (
        ("prompt", "prompt"),
        ("chosen, scored", "chosen"),
        ("rejected, scored", "rejected"),
        ("context inside a completion", "context"),
        ("cut", "cut"),
    )
    page = Text()
    for name, kind in legend:
        page.append(name, style=_STYLES[kind]).append("  ")
    page.append("\n")
    if (words := date.in_words()) is not None:
        page.append(f"{printable(words)}\n", style="dim")
    for entry in entries:
        page.append(f"\n{printable(entry['where'])}\n", style="bold")
        if "error" in entry:
            page.append(f"  {printable(entry['error'])}\n", style="yellow")
            continue
        if entry["dropped"]:
            page.append(f"  left out: {entry['dropped']}\n", style="yellow")
        if entry["merged"]:
            page.append("  the prompt's last token changes when a completion follows\n", style="yellow")
        for kind in entry["odd_ends"]:
            page.append(f"  {FOUND[kind].title}: {FOUND[kind].why}\n", style="yellow")
        for side in (side for side in ("chosen", "rejected") if side in entry):
            counts = ", ".join(f"{count} {kind}" for kind, count in _counts(entry[side]).items())
            page.append(f"{side} ({counts} tokens)\n", style="bold " + _STYLES[side])
            for segment in entry[side]:
                page.append(printable(segment["text"]), style=_STYLES[segment["kind"]])
            page.append("\n")
    return page


def _entries(config: PreviewConfig, tokenizer: PairTokenizer, ends: Ends) -> Iterator[dict[str, Any]]:
    for item in itertools.islice(scan_pairs(config, start=config.start), config.pairs):
        if isinstance(item, BadRow):
            yield {"where": item.error.where, "error": item.error.what}
            continue
        (whole,) = tokenizer.encode([item])
        if isinstance(whole, DataError):
            yield {"where": item.where, "error": whole.what}
        else:
            odd = ends.odd(whole, plain=isinstance(item.prompt, str))
            yield {**_entry(item, whole, tokenizer), "odd_ends": sorted(odd)}


def _entry(pair: PreferencePair, whole: PairIds, tokenizer: PairTokenizer) -> dict[str, Any]:
    fitted = tokenizer.fit(pair, whole)
    entry: dict[str, Any] = {
        "where": pair.where,
        "source": pair.source,
        "dropped": None if isinstance(fitted, TokenizedPair) else fitted.reason,
        "merged": whole.merged,
    }
    sides = [
        ("chosen", whole.chosen, whole.chosen_mask),
        ("rejected", whole.rejected, whole.rejected_mask),
    ]
    if pair.label is not None:
        sides = sides[:1] if pair.label else sides[1:]
    for side, ids, mask in sides:
        prompt_kept, kept_ids = 0, 0
        if isinstance(fitted, TokenizedPair):
            prompt_kept = len(fitted.prompt_ids)
            kept_ids = len(fitted.chosen_ids if side == "chosen" else fitted.rejected_ids)
        cut_prompt = len(whole.prompt) - prompt_kept
        parts = [
            ("cut", whole.prompt[:cut_prompt]),
            ("prompt", whole.prompt[cut_prompt:]),
            *_turns(side, ids[:kept_ids], None if mask is None else mask[:kept_ids]),
            ("cut", ids[kept_ids:]),
        ]
        entry[side] = list(_segments(parts, tokenizer))
    return entry


def _turns(side: str, ids: IdArray, mask: MaskArray | None) -> list[tuple[str, IdArray]]:
    """A completion divided into what is scored and what is context."""
    if mask is None:
        return [(side, ids)]
    borders = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    runs = zip(np.split(ids, borders), np.split(mask, borders), strict=True)
    return [(side if counts.all() else "context", run) for run, counts in runs]


def _counts(segments: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens of each kind."""
    counts: dict[str, int] = {}
    for segment in segments:
        counts[segment["kind"]] = counts.get(segment["kind"], 0) + len(segment["ids"])
    return counts


def _segments(parts: list[tuple[str, IdArray]], tokenizer: PairTokenizer) -> Iterator[dict[str, Any]]:
    """Texts that together are the decoded sequence: a character's bytes may stand in two parts."""
    sequence = np.concatenate([ids for _, ids in parts]).tolist()
    whole = str(tokenizer.tokenizer.decode(sequence))
    end, shown = 0, 0
    for kind, ids in parts:
        end += len(ids)
        # Half a character decodes to something else, so it is shown with the part that completes it.
        begun = common_prefix_length(whole, str(tokenizer.tokenizer.decode(sequence[:end])))
        if len(ids):
            yield {"kind": kind, "ids": ids.tolist(), "text": whole[shown:begun]}
            shown = begun
