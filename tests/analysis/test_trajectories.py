import numpy as np
import pytest

from dpo_opt.analysis.load import scan_pair_logps
from dpo_opt.analysis.slices import shard_slices
from dpo_opt.analysis.trajectories import trajectories
from dpo_opt.schemas.pair_logps import write_pair_logps


@pytest.fixture
def run(tmp_path, shards_writer, run_writer, texts):
    pairs = shards_writer(tmp_path / "shards", texts(80, prompts=30), pairs_per_shard=20)
    return run_writer(tmp_path / "run", tmp_path / "shards", pairs), pairs


def test_points_are_means_over_the_pairs_of_an_interval(run, tmp_path, fake_policy):
    _, pairs = run
    policy = fake_policy(pairs)
    steps = {0: [0, 1, 2], 7: [5, 6], 8: [7], 300: [8, 9]}
    rows = [r for step, at in steps.items() for r in policy.rows(at, step=step, steps=300, phase="train")]
    rows += policy.rows([20, 21], step=150, steps=300, phase="eval")
    write_pair_logps(tmp_path / "one.parquet", [rows])
    frame = trajectories(
        scan_pair_logps(tmp_path / "one.parquet"), shard_slices(tmp_path / "shards"), beta=0.1
    ).points
    # 301 steps in 24 intervals of 13: steps 0, 7 and 8 are one point.
    assert frame["phase"].to_list() == ["train", "eval", "train"]
    assert frame["step"].to_list() == pytest.approx([(0 * 3 + 7 * 2 + 8) / 6, 150, 300])
    assert frame["pairs"].to_list() == [6, 2, 2]
    for point, members in zip(frame.iter_rows(named=True), (rows[:6], rows[8:], rows[6:8]), strict=True):
        chosen = np.array([r.chosen_logps - pairs[r.row].ref_chosen_logps for r in members])
        rejected = np.array([r.rejected_logps - pairs[r.row].ref_rejected_logps for r in members])
        assert point["chosen_logratio"] == pytest.approx(chosen.mean())
        assert point["rejected_logratio"] == pytest.approx(rejected.mean())
        assert point["chosen_fell"] == pytest.approx((chosen < 0).mean())


def test_slicing_does_not_change_the_curves(run, monkeypatch):
    path, _ = run
    logps = scan_pair_logps(path)
    whole = trajectories(logps, shard_slices(path.parent / "shards"), beta=0.1, drivers=5)
    monkeypatch.setattr("dpo_opt.analysis.slices._SLICE_ROWS", 20)
    slices = shard_slices(path.parent / "shards")
    assert len(slices) == 4
    sliced = trajectories(logps, slices, beta=0.1, drivers=5)
    for one, other in zip(whole, sliced, strict=True):
        assert one.columns == other.columns
        for name in one.columns[1:]:
            assert other[name].to_numpy() == pytest.approx(one[name].to_numpy())
