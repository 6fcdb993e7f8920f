"""Makes the preference data of one seed: samples of the reference, their rewards, and scored pairs."""

from pathlib import Path

from folders import Work, dpo_opt

from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.shard_folder import ShardFolder


def make_preferences(work: Work, seed: int) -> None:
    """Write ``samples/``, ``judged/`` and ``shards/`` of a seed, as far as they are not there."""
    experiment, folder = work.experiment, work.of_seed(seed)
    if _is_whole(folder):
        return
    samples, judged = folder / "samples", folder / "judged"
    with_model = ("--model", work.model, "--backend", experiment.backend)
    counts = ("--num-samples", experiment.completions, "--max-new-tokens", experiment.max_new_tokens)
    prompts = ("--prompts", work.prompts("train"), "--seed", seed)
    dpo_opt(work, "sample", *with_model, *prompts, *counts, "--output", samples)
    dpo_opt(work, "judge", "--samples", samples, "--output", judged, "--function", work.reward)
    # At this length a completion that sampling cut is cut again: no end of sequence stands behind it.
    longest = experiment.prompt_tokens + experiment.max_new_tokens
    data = ("--data", judged / "ranked.jsonl", "--max-length", longest)
    dpo_opt(work, "precompute", *with_model, *data, "--shards", folder / "shards")


def _is_whole(folder: Path) -> bool:
    try:
        ShardFolder.open(folder / "shards")
    except DpoOptError:
        return False
    return True
