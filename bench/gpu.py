"""Training speed, memory and MFU on one CUDA device, without data, weights or network: one table.

    python bench/gpu.py                                # all that fits the device
    python bench/gpu.py --shapes 0.5b --mixes 512/512/512
    python bench/gpu.py --shapes tiny --mixes 12/8/8   # runs on a CPU too; its figures mean nothing

Random weights in the shapes of Qwen2.5-0.5B, 1.5B, 3B and Llama-3.1-8B; random pairs of P/C/R prompt, chosen
and rejected tokens, or of lengths spread like those of HH-RLHF. Every contender trains the same pairs in
the same steps, with fp32 parameters, bf16 compute and fused AdamW, references known and not counted:

* dpo-opt's own step (pack, forward, loss, backward, clip, update), prefixes shared or not, activations kept
  or computed again;
* TRL's DPOTrainer where it is installed; elsewhere a plain padded baseline: chosen and rejected side by side,
  full logits of the completion rows alone. Both use the flash-attn package where it is, and SDPA elsewhere.

Each runs with several sizes of micro-batch and counts with its fastest; ratios are to the fastest baseline.
MFU is model FLOPs, each prompt counted once for everybody and recomputation not at all (6 N T + 12 h L A +
6 d V (C + R) per pair), over seconds times the rate of a large matrix product measured here. A shape that
cannot fit is left out, with a line. The loss of the first step is ln 2 = 0.6931 where all is well.

For a machine without a package index, `pip download -d wheels pydantic universal_pathlib` where there is one
(for that machine's Python and platform; trl and datasets too, to compare with TRL), then there `pip install
--no-index --find-links wheels pydantic universal_pathlib`, and for this repository `pip install --no-index
--no-deps --no-build-isolation -e .`
"""

import argparse
import gc
import itertools
import math
from collections.abc import Callable, Iterator

import gpu_contenders
import torch
from gpu_contenders import Contender, Measured, Unshared, installed, now, ours
from gpu_tasks import SHAPES, Task, config_of, made_up_pairs, model_flops, parameters_of
from transformers import PreTrainedConfig

from dpo_opt.optimize.forward.policy import Policy

# fp32 parameter and gradient, and AdamW's two moments.
_BYTES_PER_PARAMETER = 16


def main() -> None:
    """Run every contender on every shape and mix, and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b", "3b", "8b"])
    parser.add_argument("--mixes", nargs="+", default=["512/512/512", "1024/256/256", "hh-like"])
    parser.add_argument("--pairs-per-step", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="counted steps, after one that is not")
    parser.add_argument("--micro-tokens", nargs="+", type=int, default=[8192, 16384], help="tried by dpo-opt")
    parser.add_argument("--micro-pairs", nargs="+", type=int, default=[4, 8], help="tried by the baseline")
    parser.add_argument("--baseline", choices=["auto", "trl", "padded"], default="auto")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = gemm_rate(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; measured GEMM rate {rate / 1e12:.2f} TFLOP/s ({dtype})")
    print("| shape | P/C/R | contender | micro-batch | s per step | pairs/s | peak GB | peak | MFU | loss |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    peer = arguments.baseline if arguments.baseline != "auto" else "trl" if installed("trl") else "padded"
    for shape, mix in itertools.product(arguments.shapes, arguments.mixes):
        config = config_of(shape)
        lacking = _lacking(config, device)
        if lacking:
            print(f"| {shape} | {mix} | left out: {lacking} |", flush=True)
            continue
        pairs = made_up_pairs(mix, arguments.pairs_per_step * (arguments.steps + 1))
        task = Task(config, pairs, arguments.pairs_per_step, device, dtype)
        results = dict(_results(task, arguments, peer=peer))
        _print(f"| {shape} | {mix} |", task, results, rate)


def _results(
    task: Task, arguments: argparse.Namespace, *, peer: str
) -> Iterator[tuple[str, Measured | None]]:
    """The fastest run of each contender; None where none fits."""
    baseline: Callable[..., Contender] = getattr(gpu_contenders, peer)
    contenders = [
        ("dpo-opt", ours(Policy, checkpointing=False), arguments.micro_tokens),
        ("dpo-opt, checkpointing", ours(Policy, checkpointing=True), arguments.micro_tokens),
        ("dpo-opt, nothing shared", ours(Unshared, checkpointing=False), arguments.micro_tokens),
        (peer, baseline(checkpointing=False), arguments.micro_pairs),
        (f"{peer}, checkpointing", baseline(checkpointing=True), arguments.micro_pairs),
    ]
    for name, contender, sizes in contenders:
        runs = [run for size in sizes if (run := _attempt(contender, task, size)) is not None]
        yield name, min(runs, key=lambda run: run.seconds, default=None)


def _attempt(contender: Contender, task: Task, size: int) -> Measured | None:
    cuda = task.device.type == "cuda"
    left_by_others = torch.cuda.memory_allocated() if cuda else 0
    try:
        run = contender(task, size)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return run._replace(peak=run.peak - left_by_others)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the best of several large square products."""
    size, count = (8192, 20) if device.type == "cuda" else (1024, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        began = now(device)
        for _ in range(count):
            torch.mm(left, right)
        best = min(best, (now(device) - began) / count)
    return 2 * size**3 / best


def _lacking(config: PreTrainedConfig, device: torch.device) -> str:
    """Why a shape cannot fit this device, or nothing."""
    if device.type != "cuda":
        return ""
    needed = _BYTES_PER_PARAMETER * sum(p.numel() for p in parameters_of(config).values())
    free = torch.cuda.mem_get_info()[0]
    if needed < free:
        return ""
    return f"parameters, gradients and AdamW take {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"


def _print(begin: str, task: Task, results: dict[str, Measured | None], rate: float) -> None:
    """Speed and peak of each contender, and how they relate to the fastest baseline's."""
    baselines = [r for name, r in results.items() if r is not None and not name.startswith("dpo-opt")]
    base = min(baselines, key=lambda r: r.seconds, default=None)
    flops = model_flops(task.config, *task.pairs) / len(task.pairs) * task.per_step
    for name, run in results.items():
        if run is None:
            print(f"{begin} {name} | out of memory |", flush=True)
            continue
        faster = f"{base.seconds / run.seconds:.2f}x" if base else "-"
        smaller = f"{run.peak / base.peak:.2f}x" if base and not math.isnan(run.peak) else "-"
        peak = "-" if math.isnan(run.peak) else f"{run.peak / 1e9:.1f}"
        cells = [name, run.micro_batch, f"{run.seconds:.3f}", faster, peak, smaller]
        cells += [f"{flops / run.seconds / rate:.2f}", f"{run.first_loss:.4f}"]
        print(begin, " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
