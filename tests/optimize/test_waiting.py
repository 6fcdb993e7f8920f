"""How often a step would make the CPU wait for a GPU. Counted on a CPU, which can read every tensor."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_opt.optimize import TrainConfig, loop, train

# Their result, or its size, is needed before the CPU can go on.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
}


class Waits(TorchDispatchMode):
    """Counts what waits for a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.name().partition(".")[0]
        by_flags = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or by_flags:
            self.found[name] += 1
        return operation(*args, **(kwargs or {}))


def test_a_step_waits_once(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Counter[str]] = []
    step = loop.train_step

    def counted(*args: Any) -> None:
        with Waits() as waits, pytest.MonkeyPatch.context() as patch:
            # These read values without an operation.
            for name in ("tolist", "numpy", "cpu"):
                exact = getattr(Tensor, name)

                def reading(*args: Any, name: str = name, exact: Any = exact, **kwargs: Any) -> Any:
                    waits.found[name] += 1
                    return exact(*args, **kwargs)

                patch.setattr(Tensor, name, reading)
            step(*args)
        steps.append(waits.found)

    monkeypatch.setattr(loop, "train_step", counted)
    config = TrainConfig(
        shards=shards, model=str(tiny_model), output_dir=tmp_path / "run", batch_size=8, learning_rate=1e-3,
        max_steps=2, micro_batch_tokens=200,
    )  # fmt: skip
    train(config)
    # To know that the update is finite before it is made.
    assert steps == [Counter({"aten::_local_scalar_dense": 1})] * 2
