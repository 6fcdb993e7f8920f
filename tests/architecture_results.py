"""What loading makes of a tiny model of each architecture: packed, padded, or refused with the reason.

``python tests/architecture_results.py`` writes the column of the installed transformers into
docs/architectures.md, and leaves the other columns as they are.
"""

import contextlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import all_architectures
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dpo_opt.optimize.forward.architecture import auto_class
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
LONGEST = 64
CPU = torch.device("cpu")
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size")
_WINDOWS += ("local_attention", "attention_chunk_size", "keep_window_size")


class Result(NamedTuple):
    """Of one architecture."""

    layout: str
    """``packed``, ``padded``, either ``, float32 only``, or ``refused: REASON``."""
    difference: float
    """Largest from the model's own forward over whole pairs, in nats; 0 where it is refused."""


def windows(config: PreTrainedConfig) -> list[str]:
    """Names of what limits how far back a row of the text model sees."""
    text = config.get_text_config()
    return [name for name in _WINDOWS if isinstance(getattr(text, name, None), int)]


def save_tiny(model_type: str, folder: Path, *, window: int | None = None) -> None:
    """Random weights of every kind that the architecture has; sparse attention may see all keys of a test.

    With a ``window``, every limit to how far back a row sees is set to it.
    """
    config = all_architectures.tiny_config(model_type)
    text = config.get_text_config()
    for name in windows(config) if window else ():
        setattr(text, name, window)
    if getattr(text, "index_topk", None):
        text.index_topk = LONGEST
    torch.manual_seed(0)
    model = all_architectures.auto_class(model_type).from_config(config).float()
    all_architectures.randomize(model)
    model.save_pretrained(folder)


def pairs() -> list[Group]:
    """Longer than every window, with and without a shared beginning, of one token and of many."""
    rng = np.random.default_rng(3)
    ordinary = np.array(all_architectures.ORDINARY, dtype=np.int32)
    found: list[Group] = []
    for prompt_length, lengths in ((25, (9, 14)), (1, (5, 6)), (30, (1, 12))):
        prompt = rng.choice(ordinary, size=prompt_length)
        chosen, rejected = (rng.choice(ordinary, size=length) for length in lengths)
        if prompt_length == 25:
            rejected[:3] = chosen[:3]
        found.append((TokenSequence(prompt, chosen), TokenSequence(prompt, rejected)))
    return found


@torch.no_grad()
def own_logps(folder: Path) -> list[Tensor]:
    """The model's, one sequence at a time, through its eager attention and all logits."""
    from dpo_opt.schemas.model_config import load_model_config

    config = load_model_config(folder)
    kind = auto_class(config)
    model = kind.from_pretrained(folder, dtype=torch.float32)
    with contextlib.suppress(ValueError):
        model.set_attn_implementation("eager")
    model.eval()
    found = []
    for sequence in (s for group in pairs() for s in group):
        joined = torch.from_numpy(
            np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64)
        )
        logits = model(input_ids=joined[None], use_cache=False).logits[0, :-1].double()
        logps = logits.log_softmax(-1).gather(1, joined[1:, None]).squeeze(1)
        found.append(logps[len(sequence.prompt_ids) - 1 :])
    return found


def result_of(model_type: str, folder: Path, *, window: int | None = None) -> Result:
    """Build, load, and compare; in bf16 the layout must be the same."""
    save_tiny(model_type, folder, window=window)
    try:
        policy = load(folder, torch.float32)
    except ConfigError as error:
        return Result(f"refused: {reason(error)}", 0.0)
    with torch.no_grad():
        found = torch.cat([logps.double() for logps in policy.sequence_logps(pairs())])
    difference = float((found - torch.cat(own_logps(folder))).abs().max())
    layout = "packed" if policy.packs else "padded"
    if window is not None:
        return Result(layout, difference)
    try:
        half = load(folder, torch.bfloat16, trainable=False)  # as below an adapter
    except ConfigError as error:
        # Some layers mix dtypes, or random weights make of rounding more than is allowed.
        if "in bfloat16" not in error.what:
            raise
        return Result(f"{layout}, float32 only", difference)
    assert half.packs == policy.packs, "the layout depends on the dtype"
    return Result(layout, difference)


def load(folder: Path, dtype: torch.dtype, *, trainable: bool = True) -> Policy:
    return load_policy(
        folder, dtype=dtype, device=CPU, trainable=trainable, max_length=LONGEST, param_dtype=dtype
    )


def reason(error: ConfigError) -> str:
    """Why a model is refused, without names and numbers."""
    what = error.what
    if "does not run on token ids alone" in what:
        return "does not run on text alone"
    if "no head" in what:
        return "has no head that is one matrix"
    if "cannot load the model" in what or "cannot make this model" in what:
        return "no Auto class of transformers loads it"
    if "not causal" in what:
        return "is not causal"
    if "other layers between" in what:
        return "other layers between its decoder and its head"
    if "its logits are not" in what:
        return "its logits are not what its head and configuration say"
    return "its decoder is hidden"


def results() -> dict[str, str]:
    found = {}
    for model_type in all_architectures.model_types():
        if model_type in all_architectures.BROKEN:
            found[model_type] = f"not built: {all_architectures.BROKEN[model_type]}"
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[model_type], difference = result_of(model_type, Path(folder))
        print(model_type, found[model_type], f"{difference:.1e}", flush=True)
    return found


def documented(transformers_version: str) -> dict[str, str]:
    """What the page says for a version; empty where it has no column for it."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    header = rows[0]
    if transformers_version not in header:
        return {}
    column = header.index(transformers_version)
    return {row[0].strip("`"): row[column] for row in rows[1:] if row[column] != "-"}


def series(full: str) -> str:
    """``5.19.0`` is ``5.19``."""
    return ".".join(full.split(".")[:2])


def write_page() -> None:
    found = {series(version("transformers")): results()}
    head, _, table = PAGE.read_text(encoding="utf-8").partition("| type |")
    for column in [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")] if table else []:
        if column and column not in found:
            found[column] = documented(column)
    columns = sorted(found, key=lambda name: tuple(map(int, name.split("."))))
    types = sorted({name for column in found.values() for name in column})
    lines = [f"| type | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| `{name}` | {' | '.join(found[c].get(name, '-') for c in columns)} |" for name in types]
    PAGE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_page())
