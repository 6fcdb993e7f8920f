"""Whether ``dpo-opt diagnose`` names a cause that was planted, and leaves healthy runs alone.

    python bench/planted_causes.py --data DATA --model MODEL --output FOLDER --seeds 11 12 13

Every run trains on real texts (``planted_pairs.py``) and differs from a healthy one in a single thing. A run
that has been judged is not trained again, so a stopped experiment goes on; ``--again`` judges all of them
again without training. Thresholds were set on the seeds 0 and 1.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from planted_pairs import (
    Pair,
    a_tenth_swapped,
    answers,
    human,
    longer_chosen,
    one_source_swapped,
    one_word_differs,
    tone,
)
from safetensors.torch import load_file, save_file

from dpo_opt.analysis.diagnosis.diagnose import diagnose
from dpo_opt.cli import main as dpo_opt

HEALTHY = "healthy"
REFUSED = "refused"
RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One thing that may be wrong, or nothing."""

    expected: str
    """The first finding."""
    pairs: Callable[[Path, int, int], list[Pair]]
    count: int = 240
    precompute: dict[str, object] = field(default_factory=dict)
    train: dict[str, object] = field(default_factory=dict)
    begins_trained: bool = False
    """Whether the policy is not the reference, but what an earlier run made of it."""
    rounded: bool = False
    """Whether the model is stored in bf16, as most are, and so is what training makes of it."""
    scored: bool = False
    """Whether the trained model is scored as it was saved."""


KINDS = {
    "control: answers": Kind(expected=HEALTHY, pairs=answers, count=300),
    "control: tone": Kind(expected=HEALTHY, pairs=tone, count=300),
    "control: human labels": Kind(expected=HEALTHY, pairs=human, count=300),
    "10% of the labels swapped": Kind(expected="swapped_labels", pairs=a_tenth_swapped, count=480),
    "learning rate x 30": Kind(
        expected="learning_rate_too_high", pairs=tone, train={"learning_rate": 30 * RATE}
    ),
    "beta 0.005": Kind(expected="beta_too_low", pairs=answers, train={"beta": 0.005}),
    "length-biased labels": Kind(expected="length_exploited", pairs=longer_chosen, count=600),
    "near-identical pairs": Kind(expected="likelihood_displacement", pairs=one_word_differs),
    "updates lost in a bf16 model": Kind(
        expected="precision_lost",
        pairs=answers,
        train={"learning_rate": 3e-6, "save_dtype": "auto"},
        rounded=True,
        scored=True,
    ),
    "reference of other weights": Kind(expected="wrong_reference", pairs=answers, begins_trained=True),
    "20 epochs": Kind(
        expected="overfitting",
        pairs=human,
        count=120,
        train={"num_train_epochs": 20, "eval_split": 0.4, "eval_steps": 24},
    ),
    "learning rate / 1000": Kind(
        expected="nothing_learnt", pairs=answers, train={"learning_rate": RATE / 1000}
    ),
    "one poisoned source": Kind(expected="one_source_against", pairs=one_source_swapped),
    "completions cut": Kind(expected="truncated_completions", pairs=answers, precompute={"max_length": 100}),
    "fp16 training": Kind(expected=REFUSED, pairs=answers, count=40, train={"dtype": "float16"}),
}


def main() -> None:
    """Run what was not run before, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and what was found")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--again", action="store_true", help="judge again what has been trained")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.kinds:
            folder = folder_of(arguments.output, name, seed)
            run_kind(KINDS[name], folder, data=arguments.data, model=arguments.model, seed=seed)
            judge(KINDS[name], folder, again=arguments.again)
    print("\n".join(table(arguments.output, arguments.kinds, arguments.seeds)))


def folder_of(output: Path, name: str, seed: int) -> Path:
    """Where a kind's run of a seed lies."""
    return output / f"seed-{seed}" / "".join(c if c.isalnum() else "-" for c in name)


def run_kind(kind: Kind, folder: Path, *, data: Path, model: Path, seed: int) -> None:
    """Score and train one kind, unless that is done."""
    if (folder / "done").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind.rounded:
        model = _rounded(model, folder / "model")
    pairs = kind.pairs(data, kind.count, seed)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    scoring = {"backend": "hf", "dtype": "float32", "processes": 1} | kind.precompute
    command("precompute", model=model, data=folder / "pairs.jsonl", shards=folder / "shards", **scoring)
    usual: dict[str, object] = {
        "learning_rate": RATE, "batch_size": 12, "eval_split": 0.25, "eval_steps": 1000, "logging_steps": 1,
        "dtype": "float32", "save_dtype": "float32", "save_minutes": "inf", "seed": seed,
    }  # fmt: skip
    shards = {"shards": folder / "shards"}
    if kind.begins_trained:
        earlier = folder / "earlier"
        command("train", "--resume", model=model, output_dir=earlier, **shards, **usual)
        model, flags = earlier / "final", ("--resume", "--reference-differs")
    else:
        flags = ("--resume",)
    code = command(
        "train", *flags, model=model, output_dir=folder / "run", **shards, **(usual | kind.train),
        allowed=(0, 2) if kind.expected == REFUSED else (0,),
    )  # fmt: skip
    if kind.scored:
        final, output = folder / "run" / "final", folder / "run" / "scores" / "final.parquet"
        command("score", model=final, output=output, **shards)
    (folder / "done").write_text(str(code))


def judge(kind: Kind, folder: Path, *, again: bool = False) -> dict[str, list[str]]:
    """What the diagnosis says: ``findings`` in their order, or the verdict, and the first's ``evidence``."""
    file = folder / "found.json"
    if file.is_file() and not again:
        found: dict[str, list[str]] = json.loads(file.read_text())
        return found
    if (folder / "done").read_text() == "2":
        found = {"findings": [REFUSED], "evidence": []}
    else:
        result = diagnose(folder / "run")
        found = {
            "findings": [finding.cause for finding in result.findings] or [result.verdict],
            "evidence": [measure.line for finding in result.findings[:1] for measure in finding.evidence],
        }
    file.write_text(json.dumps(found, indent=1))
    return found


def table(output: Path, kinds: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The result as Markdown: a row for each kind, the findings of each seed, how many were right."""
    lines = [
        f"| planted | expected first | {' | '.join(f'seed {seed}' for seed in seeds)} | right |",
        f"|---|---|{'---|' * len(seeds)}---|",
    ]
    for name in kinds:
        found = [judge(KINDS[name], folder_of(output, name, seed))["findings"] for seed in seeds]
        right = sum(findings[0] == KINDS[name].expected for findings in found)
        cells = [", ".join(findings) for findings in found]
        lines.append(f"| {name} | {KINDS[name].expected} | {' | '.join(cells)} | {right} of {len(seeds)} |")
    return lines


def _rounded(model: Path, folder: Path) -> Path:
    """A copy of a model whose weights are stored in bf16."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    for file in folder.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}))
    return folder


def command(name: str, *flags: str, allowed: tuple[int, ...] = (0,), **options: object) -> int:
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    try:
        dpo_opt([name, *flags, *words], standalone_mode=False)
    except click.ClickException as error:
        if error.exit_code not in allowed:
            raise
        return error.exit_code
    return 0


if __name__ == "__main__":
    main()
