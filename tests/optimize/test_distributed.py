"""A step on two and three real processes against the same step alone; how processes meet, and part."""

import json
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchrun_meeting
from processes import free_port, start
from safetensors.torch import load_file
from torch import Tensor
from torchrun_steps import ALONE, pair_groups
from transformers import AutoModelForCausalLM

from dpo_opt.optimize.forward.balance import balance, even_bins, forward_cost, group_cost
from dpo_opt.optimize.forward.packing import packed_size, pad
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.processes.distributed import (
    any_rank,
    clip_gradients,
    first_host,
    from_first,
    process_group,
    sum_over_ranks,
    text_from_first,
    world_from_environment,
)
from dpo_opt.optimize.processes.fsdp import gather_policy, shard_policy
from dpo_opt.schemas.errors import ConfigError

MEETING = Path(torchrun_meeting.__file__)
SIZES = (2, 3)
STEP = {"SLURM_JOB_ID": "70013", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "2"}


def facts(folder: Path, rank: int = 0) -> dict[str, object]:
    return dict(json.loads((folder / f"facts-{rank}.json").read_text(encoding="utf-8")))


def assert_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor's largest error, relative to its largest entry."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).abs().max()
        assert error <= tolerance * tensor.double().abs().max(), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", ["untied", "tied"])
@pytest.mark.parametrize("pairs", [9, 3, 1])
def test_gradients_are_those_of_one_process(
    torchrun_folders: dict[int, Path], size: int, head: str, pairs: int
) -> None:
    alone, several = (load_file(torchrun_folders[n] / f"{head}-{pairs}.safetensors") for n in (1, size))
    assert len(several) == (22 if head == "untied" else 21)
    assert_like(several, alone, 1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_the_step_after_an_update_is_that_of_one_process(
    torchrun_folders: dict[int, Path], size: int, head: str
) -> None:
    alone, several = (load_file(torchrun_folders[n] / f"{head}-second.safetensors") for n in (1, size))
    assert_like(several, alone, 1e-6)
    first = load_file(torchrun_folders[1] / f"{head}-9.safetensors")
    assert not torch.allclose(first["results"], alone["results"], rtol=1e-3)
    norms = [facts(torchrun_folders[n])["norms"][head] for n in (1, size)]  # type: ignore[index]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert norms[0] > 0.05  # or nothing would have been clipped


@pytest.mark.parametrize("size", SIZES)
def test_frozen_parameters_get_no_gradient_on_any_process(
    torchrun_folders: dict[int, Path], size: int
) -> None:
    alone, several = (load_file(torchrun_folders[n] / "frozen.safetensors") for n in (1, size))
    assert sorted(several) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)] + ["results"]
    assert_like(several, alone, 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_half_precision_gradients_are_summed_in_full(torchrun_folders: dict[int, Path], size: int) -> None:
    alone, several = (load_file(torchrun_folders[n] / "bf16.safetensors") for n in (1, size))
    assert all(tensor.dtype != torch.bfloat16 for tensor in several.values())
    # Alone, what is between the layers is fp32; spread, it is bf16.
    assert_like(several, alone, 0.1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_a_spread_policy_is_saved_as_any_other(
    torchrun_folders: dict[int, Path], size: int, head: str
) -> None:
    folder = torchrun_folders[size]
    assert sorted(path.name for path in (folder / f"{head}-final").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    held = load_file(folder / f"{head}-held.safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(folder / f"{head}-final", output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, held[name])


@pytest.mark.parametrize("size", SIZES)
def test_all_processes_hear_the_same(torchrun_folders: dict[int, Path], size: int) -> None:
    for rank in range(size):
        heard = facts(torchrun_folders[size], rank)
        assert heard["no flag"] is False
        assert heard["last rank's flag"] is True
        assert heard["failed"] == ["[Errno 28] No space left on device", str([*range(size)])]
        assert heard["number"] == 7
        assert heard["text"] == "ö0"


@pytest.mark.parametrize("pairs", [9, 3, 1])
def test_a_step_has_the_same_pairs_on_any_number_of_processes(
    torchrun_folders: dict[int, Path], pairs: int
) -> None:
    for size, folder in torchrun_folders.items():
        for rank in range(size):
            plan = facts(folder, rank)["plans"][f"untied-{pairs}"]  # type: ignore[index]
            assert len(plan) == size
            assert len({len(own) for own in plan}) == 1
            assert sorted(i for own in plan for batch in own for i in batch) == list(range(pairs))
    # What the empty micro-batches are for: one before, one after another.
    plan = facts(torchrun_folders[2])["plans"][f"untied-{pairs}"]  # type: ignore[index]
    assert sum(not batch for own in plan for batch in own) == (0 if pairs == 9 else 1)


def test_alone_everything_is_as_without_processes(policy: Policy) -> None:
    assert shard_policy(policy, ALONE) is policy
    assert gather_policy(policy, ALONE) is policy
    assert (any_rank(True, ALONE), any_rank(False, ALONE)) == (True, False)
    assert (from_first(3, ALONE), text_from_first("a", ALONE)) == (3, "a")
    values = torch.arange(3.0)
    assert sum_over_ranks(values, ALONE) is values
    groups = pair_groups(9)
    plan = balance(policy, groups, budget=60, cost=forward_cost(policy), ranks=1)
    assert plan == [policy.bins(groups, 60)]
    with process_group(ALONE):
        assert not torch.distributed.is_initialized()


def test_clipping_alone_is_torchs() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(7)
    clipped = []
    for clip in (clip_gradients, torch.nn.utils.clip_grad_norm_):
        parameter = torch.nn.Parameter(torch.zeros(7))
        parameter.grad = gradient.clone()
        norm = clip([parameter], 0.5)
        clipped.append((norm, parameter.grad))
    assert torch.equal(clipped[0][0], clipped[1][0])
    assert torch.equal(clipped[0][1], clipped[1][1])
    assert clipped[0][1].norm() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("packs", [True, False])
def test_pairs_are_dealt_evenly_within_the_budget(policy: Policy, ranks: int, packs: bool) -> None:
    dealer = Policy(policy.model, policy.device, policy.dtype, packs)
    cost = forward_cost(policy)
    for count in (1, 2, 7, 64):
        groups = pair_groups(count)
        costs = [group_cost(group, cost) for group in groups]
        for budget in (4, 50, 10_000):
            plan = balance(dealer, groups, budget=budget, cost=cost, ranks=ranks)
            assert plan == balance(dealer, groups, budget=budget, cost=cost, ranks=ranks)
            assert len(plan) == ranks
            assert len({len(own) for own in plan}) == 1
            batches = [batch for own in plan for batch in own if batch]
            assert sorted(i for batch in batches for i in batch) == list(range(count))
            assert len(batches) >= min(ranks, count)
            for batch in batches:
                rows = sum(packed_size(groups[i]) for i in batch)
                if not packs:
                    rows = pad([groups[i] for i in batch]).input_ids.numel()
                assert rows <= budget or len(batch) == 1
            if packs and count == 64 and budget > 4:
                loads = [sum(costs[i] for batch in own for i in batch) for own in plan]
                assert max(loads) < 1.05 * min(loads)


def test_bins_cost_about_the_same() -> None:
    rng = random.Random(0)
    sizes = [rng.randint(20, 400) for _ in range(200)]
    bins = even_bins(sizes, [float(size) for size in sizes], budget=2048, ranks=4)
    totals = [sum(sizes[i] for i in found) for found in bins]
    assert max(totals) <= 2048
    assert len(bins) % 4 == 0
    assert len(bins) - 4 < sum(sizes) / 2048  # one round more than it takes at best
    assert max(totals) < 1.03 * min(totals)


def test_costly_micro_batches_stand_side_by_side(policy: Policy) -> None:
    groups, cost = pair_groups(11), forward_cost(policy)
    plan = balance(policy, groups, budget=1, cost=cost, ranks=2)
    costs = [[sum(group_cost(groups[i], cost) for i in batch) for batch in own] for own in plan]
    rounds = list(zip(*costs, strict=True))
    assert len(rounds) == 6
    assert all(min(now) >= max(later) for now, later in pairwise(rounds))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-005,009],cpu1", "gpu003"),
        ("a12,b[1-2]", "a12"),
        ("rack[2,4]-node[10-12]", "rack2-node10"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_launchers_variables_tell_a_process_its_place() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    world = world_from_environment(torchrun | STEP)
    assert (world.rank, world.size, world.local_rank, world.meeting_point) == (5, 8, 1, "env://")
    assert not world.first
    place = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    world = world_from_environment(STEP | place | {"SLURM_STEP_NODELIST": "gpu[12-13]"})
    assert (world.rank, world.size, world.local_rank) == (1, 2, 1)
    assert world.meeting_point == f"tcp://gpu12:{10_000 + (70_013 + 2 * 101) % 20_000}"
    world = world_from_environment(STEP | place | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"})
    assert str(world.meeting_point).startswith("tcp://10.0.0.3:")


def test_a_slurm_batch_script_is_alone_whatever_its_job_asked_for() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    world = world_from_environment(batch)
    assert (world.rank, world.size, world.first, world.meeting_point) == (0, 1, True, None)
    assert world_from_environment({"RANK": "0", "WORLD_SIZE": "1"}).meeting_point is None


@pytest.mark.parametrize(
    "broken", [{"RANK": "x", "WORLD_SIZE": "2"}, STEP, STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}]
)
def test_variables_that_make_no_sense_are_refused(broken: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="launcher's variables"):
        world_from_environment(broken)


def test_processes_of_a_slurm_step_meet_and_outlive_each_other_only_with_a_message() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        start(
            MEETING, "60", "1",
            variables=STEP | address | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (out, err), (other_out, _) = (process.communicate(timeout=100) for process in both)
    assert (out, other_out) == ("40\n", "40\n"), err
    assert [process.returncode for process in both] == [1, 9]
    assert "process 0 of 2: another process of the run ended" in err
    assert "--resume" in err
    assert "Traceback" not in err


def test_a_process_whose_others_never_come_says_so() -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = start(MEETING, "1", variables=variables)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "the 2 processes of the run did not find each other" in err
    assert variables["MASTER_PORT"] in err
    assert "Traceback" not in err
