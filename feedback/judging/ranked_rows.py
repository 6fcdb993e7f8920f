"""Writes the judge's result as rows of ranked completions, which every command here reads as data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_opt.feedback.judging.candidates import Candidates
from dpo_opt.schemas.storage import publish

RANKED = "ranked.jsonl"


def write_ranked(
    folder: Path, candidates: Sequence[Candidates], scores: Sequence[Sequence[float]]
) -> dict[str, int]:
    """Publish a row for each prompt whose completions differ in score, and count rows and pairs.

    Where there is no such prompt, nothing is published.

    Args:
        folder: Folder of the judge's results.
        candidates: N prompts.
        scores: (N, K) in which K differs by prompt; larger is better.
    """
    pairs = [sum(a != b for i, a in enumerate(own) for b in own[:i]) for own in scores]
    rows = sum(map(bool, pairs))
    if rows:
        with publish(folder / RANKED) as private, private.open("w", encoding="utf-8") as file:
            for c, own, found in zip(candidates, scores, pairs, strict=True):
                if found:
                    file.write(json.dumps(_row(c, own), ensure_ascii=False) + "\n")
    return {"rows": rows, "pairs": sum(pairs), "tied_prompts": len(candidates) - rows}


def _row(c: Candidates, scores: Sequence[float]) -> dict[str, Any]:
    texts: list[Any] = c.completions
    if not isinstance(c.row["prompt"], str):
        texts = [[{"role": "assistant", "content": text}] for text in c.completions]
    return {**c.row, "completions": texts, "scores": list(scores)}
