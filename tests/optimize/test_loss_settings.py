"""The losses' settings: what may stand together, what a run records of them, and the margins of the data."""

import json
import math
import shutil
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from refusals import refusal

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.checkpoint.checkpoints import Data, require_same_run
from dpo_opt.optimize.config import LOSS_OPTIONS, LossType
from dpo_opt.optimize.losses.preference_loss import DIVERGENCES, LOSSES, options_of
from dpo_opt.optimize.losses.usable import require_usable_losses
from dpo_opt.optimize.prepare import prepare
from dpo_opt.optimize.stream import PairStream
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import MARGIN, WEIGHT, Column, write_column


def training(**others: Any) -> TrainConfig:
    return TrainConfig.model_validate({"shards": "shards", "model": "model", "output_dir": "run", **others})


def test_every_loss_and_every_option_can_be_asked_for() -> None:
    assert set(get_args(LossType)) == set(LOSSES)
    taken = {option for name in (*LOSSES, *DIVERGENCES) for option in options_of(name)} - {"divergence"}
    assert set(LOSS_OPTIONS) == taken | {"f_divergence_type"}


def test_the_help_says_the_defaults_of_the_losses() -> None:
    for name in (*LOSSES, *DIVERGENCES):
        for option, default in options_of(name).items():
            if option not in ("divergence", "label_smoothing"):
                said = TrainConfig.model_fields[option].description or ""
                assert said.endswith(f"Default: {default}." if isinstance(default, float) else "no default.")


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("exo_pair", "rdpo")])
def test_every_loss_may_stand_alone(name: str) -> None:
    config = training(loss_type=name)
    require_usable_losses(config)
    assert config.loss_options == {}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "smoothing": (
        {"loss_type": "ipo", "label_smoothing": 0.1},
        "--label-smoothing belongs to sigmoid, robust, exo_pair, aot, aot_unpaired, simpo and cpo, "
        "not to ipo",
        "leave --label-smoothing out, or pass --loss-type sigmoid",
    ),
    "gamma": (
        {"loss_type": ["sigmoid", "sft"], "simpo_gamma": 0.5},
        "--simpo-gamma belongs to simpo, not to sigmoid and sft",
        "leave --simpo-gamma out, or pass --loss-type simpo",
    ),
    "smoothing that is needed": (
        {"loss_type": "exo_pair"},
        "--loss-type exo_pair needs --label-smoothing",
        "add --label-smoothing, such as --label-smoothing 0.001",
    ),
    "alpha that is needed": (
        {"loss_type": ["rdpo", "sft"]},
        "--loss-type rdpo needs --rdpo-alpha",
        "add --rdpo-alpha, such as --rdpo-alpha 0.01",
    ),
    "divergence": (
        {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "forward_kl"},
        "--f-divergence-type forward_kl does not go with --loss-type apo_zero",
        "leave --f-divergence-type out, or take of sigmoid, robust, hinge, exo_pair, discopop",
    ),
    "divergence from nothing": (
        {"loss_type": "orpo", "f_divergence_type": "js_divergence"},
        "--f-divergence-type js_divergence does not go with --loss-type orpo",
        "leave --f-divergence-type out",
    ),
    "coefficient": (
        {"f_divergence_type": "forward_kl", "f_alpha_divergence_coef": 0.3},
        "--f-alpha-divergence-coef belongs to alpha_divergence, not to forward_kl",
        "add --f-divergence-type alpha_divergence",
    ),
    "weights": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        "--loss-weights has 1 and --loss-type 2: sigmoid sft",
        "pass 2, such as --loss-weights 1 1",
    ),
    "twice": (
        {"loss_type": ["sft", "sigmoid", "sft"]},
        "--loss-type names sft twice",
        "name sft once, and say how much it counts with --loss-weights",
    ),
    "ranks and WPO": (
        {"loss_type": ["sigmoid", "aot"], "use_weighting": True},
        "--use-weighting does not go with --loss-type aot",
        "leave --use-weighting out, or pass --loss-type sigmoid",
    ),
    "tails of cross-entropy": (
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
        "--ld-alpha does not go with --loss-type sft",
        "leave --ld-alpha out, or take sft out of --loss-type",
    ),
    "tails without log-ratios": (
        {"loss_type": "orpo", "ld_alpha": 0.5},
        "--ld-alpha does not go with --loss-type orpo",
        "leave --ld-alpha out, or pass --loss-type sigmoid",
    ),
    "a step of one pair": (
        {"loss_type": "kto_pair", "batch_size": 1},
        "--loss-type kto_pair compares the pairs of a step, and --batch-size 1 has one",
        "pass a larger --batch-size",
    ),
    "weights of labels": (
        {"desirable_weight": 1.3},
        "--desirable-weight belongs to kto and apo_zero_unpaired, not to sigmoid",
        "leave --desirable-weight out, or pass --loss-type kto",
    ),
    "single completions and pairs": (
        {"loss_type": ["sft", "kto"]},
        "--loss-type kto does not go with sft",
        "pass --loss-type kto alone",
    ),
    "single completions and LD-DPO": (
        {"loss_type": "kto", "ld_alpha": 0.5},
        "--ld-alpha does not go with --loss-type kto",
        "leave --ld-alpha out",
    ),
    "single completions and WPO": (
        {"loss_type": "kto", "use_weighting": True},
        "--use-weighting does not go with --loss-type kto",
        "leave --use-weighting out",
    ),
    "single completions and smoothing": (
        {"loss_type": "kto", "label_smoothing": 0.1},
        "--label-smoothing belongs to sigmoid, robust, exo_pair, aot, aot_unpaired, simpo and cpo, "
        "not to kto",
        "leave --label-smoothing out\n",
    ),
    "single completions and a divergence": (
        {"loss_type": "kto", "f_divergence_type": "forward_kl"},
        "--f-divergence-type forward_kl does not go with --loss-type kto",
        "leave --f-divergence-type out\n",
    ),
    "a step of one row": (
        {"loss_type": "kto", "batch_size": 1},
        "--loss-type kto estimates a KL divergence from the rows of a step, and --batch-size 1 has one",
        "pass a larger --batch-size",
    ),
    "reference": (
        {"loss_type": "simpo", "reference_differs": True},
        "--reference-differs says nothing to --loss-type simpo, which reads no reference",
        "leave --reference-differs out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_or_is_missing_is_refused(name: str, tmp_path: Path) -> None:
    settings, what, fix = REFUSED[name]
    # Through the checks before a run: no folder is opened first.
    error = refusal(lambda: prepare(training(**settings, output_dir=tmp_path / "run")))
    assert error.what == what
    assert f"{error.fix}\n".startswith(fix)
    assert error.why


ACCEPTED: list[dict[str, Any]] = [
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    {"loss_type": ["cpo", "sigmoid"], "label_smoothing": 0.1, "cpo_alpha": 0.0},
    {"loss_type": ["ipo", "sft"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    {"loss_type": "apo_zero", "f_divergence_type": "reverse_kl"},
    {"loss_type": "bco_pair", "batch_size": 1, "ld_alpha": 0.5, "use_weighting": True},
    {"loss_type": ["sigmoid", "simpo"], "reference_differs": True, "simpo_gamma": 0.5},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_what_goes_together_is_taken(settings: dict[str, Any]) -> None:
    config = training(**settings)
    require_usable_losses(config)
    assert all(getattr(config, name) in (value, [value]) for name, value in settings.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": []}, "at least 1"),
        ({"loss_type": ["sigmoid", "none"]}, "'sigmoid', 'robust'"),
        ({"loss_weights": [0.0]}, "greater than 0"),
        ({"discopop_tau": 0.0}, "greater than 0"),
        ({"ld_alpha": 1.5}, "less than or equal to 1"),
        ({"beta_dpo_filtered": 1.0}, "less than 1"),
        ({"simpo_gamma": -1.0}, "greater than or equal to 0"),
        ({"f_alpha_divergence_coef": math.inf}, "finite"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        training(**settings)


def test_a_run_records_its_losses_and_older_runs_are_the_same_run(shards: Path) -> None:
    manifest = ShardFolder.open(shards).manifest
    data = Data(
        dataset_digest=manifest.dataset_digest,
        index_sha256=manifest.index_sha256,
        fingerprint=manifest.fingerprint,
        reference_differs=False,
    )

    def settings(**others: Any) -> dict[str, Any]:
        return training(**others, dtype="float32").model_dump(mode="json", exclude={"resume"})

    def again(then: dict[str, Any], now: dict[str, Any]) -> None:
        state: Any = SimpleNamespace(settings=then, data=data)
        require_same_run(state, data=data, settings=now, run=Path("run"))

    several = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}
    again(settings(**several), settings(**several))
    assert training(**settings(**several)) == training(**several, dtype="float32")
    # A version with one loss recorded its name, and none of the options that came later.
    plain = settings()
    assert plain["loss_type"] == "sigmoid"
    later = {"loss_weights", "ld_alpha", "use_weighting", *LOSS_OPTIONS} - {"label_smoothing"}
    again({name: value for name, value in plain.items() if name not in later}, plain)
    for other in (
        {"loss_type": "ipo"},
        several,
        {"loss_weights": [2.0]},
        {"label_smoothing": 0.1},
        {"f_divergence_type": "forward_kl"},
        {"ld_alpha": 0.5, "use_weighting": True},
    ):
        error = refusal(lambda other=other: again(plain, settings(**other)))
        assert all(f"\n    {name}: " in error.what for name in other)
    error = refusal(lambda: again(settings(loss_type="simpo"), settings(loss_type="simpo", simpo_gamma=0.6)))
    assert "simpo_gamma: None then, 0.6 now" in error.what


def test_a_loss_is_described_in_words() -> None:
    assert training().described_loss == "sigmoid, beta 0.1, label smoothing 0.0"
    config = training(loss_type=["simpo", "sft"], loss_weights=[1, 0.1], simpo_gamma=0.4, label_smoothing=0.1)
    assert config.described_loss == "simpo + 0.1 x sft, beta 0.1, label smoothing 0.1, simpo gamma 0.4"
    config = training(ld_alpha=0.5, use_weighting=True)
    assert config.described_loss == "sigmoid, beta 0.1, label smoothing 0.0, ld alpha 0.5, WPO weighting"


def test_ranks_are_refused_where_pairs_have_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(settings["shards"], tmp_path / "shards"))
    rows = [pair.row for pair in ShardFolder.open(folder).pairs()]
    write_column(folder, WEIGHT, Column(array("q", rows), array("d", [1.0 + row % 2 for row in rows])))
    given = {**settings, "shards": folder}
    error = refusal(lambda: prepare(training(**given, loss_type=["sft", "aot_unpaired"])))
    assert error.what == "--loss-type aot_unpaired cannot weigh pairs, and the pairs have weights"
    assert error.where == str(folder)
    assert error.fix == "pass another loss, such as --loss-type apo_zero"
    assert prepare(training(**given, loss_type="kto_pair")).stream.weighted


# --- The margins of the data


@pytest.fixture
def settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**settings, "output_dir": tmp_path / "run"}


def with_margins(shards: Path, to: Path, *, without: int = 0) -> tuple[Path, dict[int, float]]:
    """A copy of a folder whose rows have margins, but for the first few."""
    folder = Path(shutil.copytree(shards, to))
    rows = [pair.row for pair in ShardFolder.open(folder).pairs()]
    margins = {row: 0.25 * (row % 7) - 0.5 for row in rows}
    given = dict(list(margins.items())[without:])
    write_column(folder, MARGIN, Column(array("q", given), array("d", given.values())))
    return folder, margins


@pytest.mark.parametrize("name", ["odpo", "rpo"])
def test_data_without_margins_is_refused(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    error = refusal(lambda: prepare(training(**{**settings, "loss_type": [name, "sft"]})))
    assert error.what == "the loss reads margins, and the data has none"
    assert error.where == str(settings["shards"])
    assert f"{settings['shards']}/columns/margin.parquet" in (error.fix or "")

    folder, _ = with_margins(settings["shards"], tmp_path / "shards", without=2)
    error = refusal(lambda: prepare(training(**{**settings, "shards": folder}, loss_type=name)))
    assert "has none (2 rows in all)" in error.what

    # Also those that are only evaluated on.
    folder, _ = with_margins(settings["shards"], tmp_path / "all")
    given = {**settings, "shards": folder, "eval_shards": [settings["shards"]]}
    error = refusal(lambda: prepare(training(**given, loss_type=name)))
    assert error.where == str(settings["shards"])


def test_margins_that_no_loss_reads_are_not_read(settings: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = with_margins(settings["shards"], tmp_path / "shards", without=2)
    prepared = prepare(training(**{**settings, "shards": folder}))
    assert prepared.stream.margins(prepared.stream.fetch([0])) is None


def test_a_run_trains_and_evaluates_with_each_pairs_own_margin(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """At the start every log-ratio is 0, so an odpo loss is that of its pair's offset alone."""
    folder, margins = with_margins(settings["shards"], tmp_path / "shards")
    config = training(
        **{
            **settings,
            "shards": folder,
            "learning_rate": 0.0,
            "max_steps": 2,
            "eval_steps": None,
            "logging_steps": 2,
            "save_steps": None,
            "metric_for_best_model": None,
            "loss_type": ["odpo", "hinge"],
            "loss_weights": [1.0, 0.5],
            "margin_scale": 2.0,
        }
    )
    result = train(config)
    stream = PairStream(ShardFolder.open(folder), eval_split=config.eval_split, margins=True)
    batches = stream.batches(stream.epoch(seed=config.seed, epoch=0), config.batch_size)
    rows = [pair.row for _ in range(2) for pair in next(batches)]
    expected = np.mean([math.log1p(math.exp(2.0 * margins[row])) for row in rows]) + 0.5
    assert result.last_metrics["loss"] == pytest.approx(expected, abs=1e-5)
    held_out = [pair.row for pair in stream.fetch(stream.eval_positions)]
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    (evaluated,) = (line for line in map(json.loads, lines) if "eval_loss" in line)
    expected = np.mean([math.log1p(math.exp(2.0 * margins[row])) for row in held_out]) + 0.5
    assert evaluated["eval_loss"] == pytest.approx(expected, abs=1e-5)
