"""Training speed, memory and MFU on one CUDA device, without data, weights or network, line by line.

    python bench/gpu.py                                # all that fits the device
    python bench/gpu.py --seconds 300                  # the most telling first, as many as 300 s allow
    python bench/gpu.py --shapes 0.5b --mixes 512/512/512
    python bench/gpu.py --shapes tiny --mixes 12/8/8   # runs on a CPU too; its figures mean nothing

Random weights in the shapes of Qwen2.5-0.5B, 1.5B, 3B, Llama-3.2-1B and Llama-3.1-8B; random pairs of P/C/R
prompt, chosen and rejected tokens, or of lengths spread like those of HH-RLHF. Every contender trains the
same pairs in steps of the same size, with bf16 compute and AdamW, references known and not counted.
Parameters are fp32 with torch's fused AdamW; those of the 8B are bf16, or they would not fit one card:

* dpo-opt's own step (pack, forward, loss, backward, clip, update), prefixes shared or not, activations kept
  or computed again;
* TRL's DPOTrainer where it is installed, at its best settings: its fused head, Liger's layers where they are
  installed, pairs of like length side by side, activations kept, computed again or offloaded. Elsewhere a
  plain padded baseline: chosen and rejected side by side, full logits of the completion rows alone. Both use
  the flash-attn package where it is, and SDPA elsewhere.

Each runs with several sizes of micro-batch and counts with its fastest; ratios are to the fastest baseline.
MFU is model FLOPs, each prompt counted once for everybody and recomputation not at all (6 N T + 12 h L A +
6 d V (C + R) per pair), over seconds times the rate of a large matrix product measured here. A shape that
cannot fit is left out, with a line. The loss of the first step is ln 2 = 0.6931 where all is well.

bench/gpu.sh runs this and the tests of tests/gpu on a machine without a package index.
"""

import argparse
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator

import gpu_contenders
import torch
from gpu_contenders import Contender, Measured, Unshared, installed, now, ours
from gpu_tasks import SHAPES, Task, make_task, model_flops, parameters_of

from dpo_opt.optimize.forward.policy import Policy

# Parameter, gradient and AdamW's two moments.
_VALUES_PER_PARAMETER = 4
# What a run takes beside its steps: a model's random weights, TRL's preparation of the pairs.
_START_SECONDS = 15
# Of the measured rate, before a shape has run: slower than all contenders that were ever seen.
_LEAST_MFU = 0.1
_COLUMNS = "| shape | P/C/R | contender | micro-batch | s per step | pairs/s | peak GB | MFU | loss |"


def main() -> None:
    """Run every contender on every shape and mix; print each run when it ends, and then the ratios."""
    arguments = _arguments()
    ends = time.monotonic() + arguments.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = gemm_rate(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; measured GEMM rate {rate / 1e12:.2f} TFLOP/s ({dtype})\n")
    print(_COLUMNS, "|---" * 9 + "|", sep="\n", flush=True)
    peer = arguments.baseline if arguments.baseline != "auto" else "trl" if installed("trl") else "padded"
    for mix, shape in itertools.product(arguments.mixes, arguments.shapes):
        begin = f"| {shape} | {mix} |"
        steps = arguments.steps + 1
        task = make_task(
            shape, mix, steps=steps, per_step=arguments.pairs_per_step, device=device, dtype=dtype
        )
        lacking = _lacking(task)
        if lacking:
            print(begin, f"left out: {lacking} |", flush=True)
            continue
        best: dict[str, Measured] = {}
        step_flops = model_flops(task.config, *task.pairs) / steps
        expected = _START_SECONDS + steps * step_flops / (_LEAST_MFU * rate)
        for contender, train, size in _runs(task, arguments, peer=peer):
            left = ends - time.monotonic()
            if expected > left:
                print(
                    begin,
                    f"{contender}, {size} | left out: {expected:.0f} s, {left:.0f} s are left |",
                    flush=True,
                )
                continue
            began = time.monotonic()
            run = _attempt(train, task, size)
            if run is None:
                print(begin, f"{contender}, {size} | out of memory |", flush=True)
                continue
            # The slowest so far, and as much again: the first one of a kind also compiles kernels.
            expected = min(expected, 2 * (time.monotonic() - began))
            peak = "-" if math.isnan(run.peak) else f"{run.peak / 1e9:.1f}"
            cells = [
                contender,
                run.micro_batch,
                f"{run.seconds:.3f}",
                f"{task.per_step / run.seconds:.2f}",
                peak,
            ]
            cells += [f"{step_flops / run.seconds / rate:.2f}", f"{run.first_loss:.4f}"]
            print(begin, " | ".join(cells), "|", flush=True)
            if contender not in best or run.seconds < best[contender].seconds:
                best[contender] = run
        _compare(begin, best)


def _arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes, mixes = ["1b", "0.5b", "8b", "3b", "1.5b"], ["512/512/512", "hh-like", "1024/256/256"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes if cuda else ["tiny"])
    parser.add_argument("--mixes", nargs="+", default=mixes if cuda else ["12/8/6"])
    parser.add_argument("--pairs-per-step", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="counted steps, after one that is not")
    parser.add_argument("--micro-tokens", nargs="+", type=int, default=[16384, 8192], help="tried by dpo-opt")
    parser.add_argument("--micro-pairs", nargs="+", type=int, default=[8, 4], help="tried by the baseline")
    parser.add_argument("--baseline", choices=["auto", "trl", "padded"], default="auto")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run begins that would end later")
    return parser.parse_args()


def _runs(task: Task, arguments: argparse.Namespace, *, peer: str) -> Iterator[tuple[str, Contender, int]]:
    """What is tried, the most telling first."""
    baseline: Callable[..., Contender] = getattr(gpu_contenders, peer)
    named = f"{peer}, liger" if peer == "trl" and gpu_contenders.liger(task) else peer
    recomputing = {"checkpointing": True}
    contenders = [
        ("dpo-opt", ours(Policy, checkpointing=False), arguments.micro_tokens),
        (named, baseline(checkpointing=False), arguments.micro_pairs),
        ("dpo-opt, checkpointing", ours(Policy, **recomputing), arguments.micro_tokens),
        (f"{named}, checkpointing", baseline(**recomputing), arguments.micro_pairs),
        ("dpo-opt, nothing shared", ours(Unshared, checkpointing=False), arguments.micro_tokens),
    ]
    if peer == "trl" and task.device.type == "cuda":
        offloading = gpu_contenders.trl(checkpointing=False, offloading=True)
        contenders.append((f"{named}, offloading", offloading, arguments.micro_pairs))
    for name, contender, sizes in contenders:
        for size in sizes:
            yield name, contender, size


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


def _lacking(task: Task) -> str:
    """Why a shape cannot fit this device, or nothing."""
    if task.device.type != "cuda":
        return ""
    parameters = sum(p.numel() for p in parameters_of(task.config).values())
    needed = _VALUES_PER_PARAMETER * task.param_dtype.itemsize * parameters
    free = torch.cuda.mem_get_info()[0]
    if needed < free:
        return ""
    return f"parameters, gradients and AdamW take {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"


def _compare(begin: str, best: dict[str, Measured]) -> None:
    """How the speed and peak of each contender's fastest run relate to the fastest baseline's."""
    baselines = [run for name, run in best.items() if not name.startswith("dpo-opt")]
    base = min(baselines, key=lambda run: run.seconds, default=None)
    if base is None:
        return
    for name, run in best.items():
        smaller = "-" if math.isnan(run.peak) else f"{run.peak / base.peak:.2f}x"
        cells = [
            name,
            "to the fastest baseline",
            "-",
            f"{base.seconds / run.seconds:.2f}x",
            smaller,
            "-",
            "-",
        ]
        print(begin, " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
