"""State that some number of processes saved, loaded by another, bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchrun_steps import ALONE

from dpo_opt.optimize.checkpoint import state_files
from dpo_opt.optimize.checkpoint.state_files import load_state, own_files, save_state
from dpo_opt.schemas.errors import DataError

KINDS = ["untied", "tied"]


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(40, 3),
        "half": torch.randn(7, 5).to(torch.bfloat16),
        "count": torch.tensor(2**40 + 1),
        "step": torch.tensor(3.0),
        "codes": torch.arange(256, dtype=torch.uint8),
        "transposed": torch.randn(4, 6).T,
        "strange": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def bits(tensor: Tensor) -> bytes:
    """NaN is not equal to itself."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def blank(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 9) for name, tensor in saved.items()}


def test_alone_every_bit_comes_back_in_place(tmp_path: Path) -> None:
    saved = tensors()
    save_state(tmp_path / "state", own_files(saved, ALONE), ALONE)
    loaded = blank(saved)
    before = {name: tensor.data_ptr() for name, tensor in loaded.items()}
    load_state(tmp_path / "state", loaded, ALONE)
    for name, tensor in saved.items():
        assert bits(loaded[name]) == bits(tensor), name
        assert loaded[name].data_ptr() == before[name]


def test_large_state_is_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "_FILE_BYTES", 500)
    saved = tensors()
    save_state(tmp_path / "state", own_files(saved, ALONE), ALONE)
    files = sorted((tmp_path / "state").iterdir())
    assert [file.name for file in files] == [f"state-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert set().union(*(load_file(file) for file in files)) == set(saved)
    loaded = blank(saved)
    load_state(tmp_path / "state", loaded, ALONE)
    assert all(bits(loaded[name]) == bits(tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_state_goes_from_fewer_processes_to_more(
    torchrun_folders: dict[int, Path], size: int, kind: str
) -> None:
    held = load_file(torchrun_folders[size - 1] / f"{kind}-held.safetensors")
    loaded = load_file(torchrun_folders[size] / f"{kind}-loaded.safetensors")
    assert len(held) > 80
    assert held.keys() == loaded.keys()
    assert all(bits(loaded[name]) == bits(tensor) for name, tensor in held.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_state_of_several_processes_is_loaded_by_one(
    torchrun_folders: dict[int, Path], size: int, kind: str
) -> None:
    held = load_file(torchrun_folders[size] / f"{kind}-held.safetensors")
    loaded = blank(held)
    load_state(torchrun_folders[size] / f"{kind}-state", loaded, ALONE)
    assert all(bits(loaded[name]) == bits(tensor) for name, tensor in held.items())


@pytest.mark.parametrize("size", [2, 3])
def test_each_process_writes_its_part_and_nothing_is_pickled(
    torchrun_folders: dict[int, Path], size: int
) -> None:
    files = sorted((torchrun_folders[size] / "untied-state").iterdir())
    assert [file.name for file in files] == [
        f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in range(1, size + 1)
    ]
    whole = sum(t.nbytes for t in load_file(torchrun_folders[size] / "untied-held.safetensors").values())
    parts = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert sum(parts) == whole
    assert max(parts) < 1.1 * whole / size


@pytest.mark.parametrize("size", [2, 3])
def test_parts_on_other_machines_disks_are_noticed_when_they_are_saved(
    torchrun_folders: dict[int, Path], size: int
) -> None:
    for rank in range(size):
        facts = json.loads((torchrun_folders[size] / f"facts-{rank}.json").read_text(encoding="utf-8"))
        assert f"the processes wrote {size} files, but process {rank} sees 1" in facts["own disks"]
        assert "--output-dir that all machines share" in facts["own disks"]
    alone = json.loads((torchrun_folders[1] / "facts-0.json").read_text(encoding="utf-8"))
    assert alone["own disks"] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(40, 4)}, r"weight \(torch.float32 \[40, 3\] saved, .*\[40, 4\] wanted\)"),
        ({"half": torch.zeros(7, 5)}, r"half \(torch.bfloat16 .*saved, torch.float32 .*wanted\)"),
        ({"more": torch.zeros(1)}, r"more \(missing saved, torch.float32 \[1\] wanted\)"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    save_state(tmp_path / "state", own_files(tensors(), ALONE), ALONE)
    with pytest.raises(DataError, match=message):
        load_state(tmp_path / "state", tensors() | change, ALONE)


def test_tensors_that_nobody_asks_for_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", own_files(tensors(), ALONE), ALONE)
    fewer = tensors()
    del fewer["step"]
    with pytest.raises(DataError, match=r"step \(.* saved, none wanted\)"):
        load_state(tmp_path / "state", fewer, ALONE)


def test_a_missing_part_is_named(torchrun_folders: dict[int, Path], tmp_path: Path) -> None:
    held = load_file(torchrun_folders[2] / "untied-held.safetensors")
    first = next((torchrun_folders[2] / "untied-state").glob("shard-00001-*"))
    (tmp_path / first.name).write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="tensors differ, such as"):
        load_state(tmp_path, blank(held), ALONE)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, damage: str) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "state-00001-of-00001.safetensors")
    if damage == "cut":
        with (tmp_path / "state-00001-of-00001.safetensors").open("rb+") as handle:
            handle.truncate(500)
    folder = tmp_path / "absent" if damage == "gone" else tmp_path
    with pytest.raises(DataError) as caught:
        load_state(folder, {"weight": torch.zeros(1000)}, ALONE)
    assert caught.value.exit_code == 3
