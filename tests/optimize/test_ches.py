"""CHES scores against the paper's definition, computed the long way in float64."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from transformers import PreTrainedModel

from dpo_opt.cli import main
from dpo_opt.optimize import ches as ches_module
from dpo_opt.optimize.ches import ches, write_ches
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.pairs import ScoredPair, TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import CHES, CHES_NORMALISED


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A copy of the scored pairs, to write beside them."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture(scope="module")
def exact_model(stock_model: PreTrainedModel) -> PreTrainedModel:
    """The tiny model in float64."""
    return copy.deepcopy(stock_model).double()


def states(model: PreTrainedModel, sequence: TokenSequence) -> npt.NDArray[np.float64]:
    """(C, d) of one sequence alone: transformers' own last hidden states before each completion token."""
    joined = np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64)
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(joined)[None], output_hidden_states=True)
    return output.hidden_states[-1][0, len(sequence.prompt_ids) - 1 : -1].numpy()


def require_ches(shards: Path, model: PreTrainedModel) -> None:
    """Fails where a folder's scores are not the paper's."""
    opened = ShardFolder.open(shards)
    pairs = list(opened.pairs())
    assert pairs
    rows = np.array([pair.row for pair in pairs])
    found = {name: opened.column(name, rows=rows, default=np.nan) for name in (CHES, CHES_NORMALISED)}
    for i, pair in enumerate(pairs):
        chosen, rejected = (
            states(model, TokenSequence(pair.prompt_ids, ids)) for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        for name, combine in ((CHES, np.sum), (CHES_NORMALISED, np.mean)):
            up, down = combine(chosen, axis=0), combine(rejected, axis=0)
            expected = up @ down - np.linalg.norm(up) ** 2
            scale = np.linalg.norm(up) ** 2
            assert found[name] is not None
            assert abs(found[name][i] - expected) < 1e-5 * scale, (name, pair.row)


def test_every_pair_gets_the_papers_score(
    folder: Path, tiny_model: Path, exact_model: PreTrainedModel
) -> None:
    write_ches(folder, model=str(tiny_model))
    require_ches(folder, exact_model)


def with_prompts(scorer: HfScorer, sequences: list[TokenSequence]) -> list[npt.NDArray[np.float64]]:
    """A fault: states that predict the prompt's tokens are added."""
    whole = [
        TokenSequence(s.prompt_ids[:1], np.concatenate([s.prompt_ids[1:], s.completion_ids]))
        for s in sequences
    ]
    return real_sums(scorer, whole)


def at_the_tokens(scorer: HfScorer, sequences: list[TokenSequence]) -> list[npt.NDArray[np.float64]]:
    """A fault: each state is the one at the token instead of the one before it."""
    moved = [
        TokenSequence(np.append(s.prompt_ids, s.completion_ids[:1]), np.append(s.completion_ids[1:], 0))
        for s in sequences
    ]
    return real_sums(scorer, moved)


def of_the_other_side(scorer: HfScorer, sequences: list[TokenSequence]) -> list[npt.NDArray[np.float64]]:
    """A fault: chosen and rejected change places."""
    sums = real_sums(scorer, sequences)
    return [sums[i ^ 1] for i in range(len(sums))]


real_sums = HfScorer.state_sums


@pytest.mark.parametrize("fault", [with_prompts, at_the_tokens, of_the_other_side])
def test_a_planted_fault_is_noticed(
    fault: object,
    folder: Path,
    tiny_model: Path,
    exact_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HfScorer, "state_sums", fault)
    write_ches(folder, model=str(tiny_model))
    with pytest.raises(AssertionError, match="ches"):
        require_ches(folder, exact_model)


def test_only_tokens_that_count_are_added(tiny_model: Path, exact_model: PreTrainedModel) -> None:
    rng = np.random.default_rng(3)
    prompt, completion = (rng.integers(2, 270, size=size).astype(np.int32) for size in (9, 20))
    mask = rng.random(20) < 0.5
    mask[-1] = True
    scorer = HfScorer(tiny_model, dtype="float32")
    (found,) = scorer.state_sums([TokenSequence(prompt, completion, mask)])
    expected = states(exact_model, TokenSequence(prompt, completion))
    np.testing.assert_allclose(found, expected[mask].sum(0), atol=1e-4)
    assert np.abs(found - expected.sum(0)).max() > 1e-2


def test_the_scores_of_known_vectors() -> None:
    found = ches(np.array([4.0, 0.0]), np.array([3.0, 9.0]), chosen_length=2, rejected_length=3)
    assert found.sums == 4 * 3 - 16
    assert found.means == 2 * 1 - 4


def test_another_model_than_the_reference_is_refused(folder: Path, other_model: Path) -> None:
    with pytest.raises(FingerprintError, match="weights"):
        write_ches(folder, model=str(other_model))
    assert not list((folder / "columns").glob("ches*"))


def test_a_pass_that_ends_early_leaves_no_column(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ches_module, "ches", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_ches(folder, model=str(tiny_model))
    assert not list((folder / "columns").glob("ches*"))


def test_the_command_computes_them_once_for_all_calls(folder: Path, tiny_model: Path) -> None:
    asked = ["triage", "--shards", str(folder), "--suspects", "0.25"]

    def found(*more: str) -> dict[str, object]:
        result = CliRunner().invoke(main, [*asked, "--json", *more])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    pairs: list[ScoredPair] = list(ShardFolder.open(folder).pairs())
    assert found()["without_ches"] == len(pairs)
    computed = found("--ches", str(tiny_model))
    assert (computed["without_ches"], computed["high_ches"]) == (0, len(pairs) // 4)
    assert found() == computed
    verified = CliRunner().invoke(main, ["verify", "--shards", str(folder)])
    assert verified.exit_code == 0, verified.output
