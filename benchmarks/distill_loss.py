"""A distillation loss alone, forward and backward: dwindle's fused loss beside naive torch and Liger's fused one.

    python benchmarks/distill_loss.py                               # all sides in turn, medians and ratios
    python benchmarks/distill_loss.py --peers .venv-peers/bin/python --device cuda --dtype bfloat16
    python benchmarks/distill_loss.py --who dwindle                 # one side once: one JSON line

The job: 0.5 JSD(0.5) + 0.5 label cross-entropy of 1,024 positions, from hidden states (width 1,024) and head weights
(vocabulary 49,152) of student and teacher to the gradients by the student's hidden states and head. Seconds are the
median of the calls after the first, which may compile; so is the peak, the high-water mark of the process (VmHWM; on
CUDA the allocator's) over its state with all inputs there. `cpu_seconds` counts the process's processor time, which
other load on the machine stretches less. With `--check` the gradients are held against float64.

Sides: `dwindle`; `naive`, torch's own functions; `liger` and `liger-eager`, Liger's fused linear JSD with and without
its torch.compile, in the peers' environment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDES = ("dwindle", "naive", "liger", "liger-eager")
WORK = "0.5 JSD(0.5) + 0.5 cross-entropy"


class Inputs:
    """Hidden states, head weights and labels of student and teacher; the student's want gradients."""

    def __init__(self, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        n, d, v = options.positions, options.width, options.vocabulary
        kind: dict[str, Any] = {"device": options.device, "dtype": getattr(torch, options.dtype)}

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator).mul_(scale).to(**kind)

        self.hidden, self.weight = normal(n, d), normal(v, d, scale=0.05)
        self.teacher_hidden, self.teacher_weight = normal(n, d), normal(v, d, scale=0.05)
        self.labels = torch.randint(0, v, (n,), generator=generator).to(options.device)
        self.hidden.requires_grad_(), self.weight.requires_grad_()


def naive(at: Inputs) -> Tensor:
    """Return the loss of torch's own functions."""
    from torch.nn import functional as F

    with torch.no_grad():
        log_p = torch.log_softmax((at.teacher_hidden @ at.teacher_weight.t()).float(), -1)
    log_q = torch.log_softmax((at.hidden @ at.weight.t()).float(), -1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.log(torch.tensor(2.0))
    soft = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    soft = soft + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return 0.25 * soft + 0.5 * F.nll_loss(log_q, at.labels)


def dwindle(at: Inputs) -> Tensor:
    """Return the fused loss."""
    from dwindle.distill.fused_loss import fused_loss
    from dwindle.distill.head import Head, HeadStates
    from dwindle.distill.loss_mix import LossMix, Term
    from dwindle.distill.row_losses import jsd_rows, top1_blend_rows
    from dwindle.distill.teacher_signal import TeacherTargets

    mix = LossMix((Term("jsd", jsd_rows(0.5), 0.5), Term("label", top1_blend_rows(0.0), 0.5, reads_teacher=False)))
    states = HeadStates(at.teacher_hidden, Head(at.teacher_weight))
    targets = TeacherTargets(states=(states,))
    return fused_loss(at.hidden, Head(at.weight), mix, targets=targets, labels=at.labels)[0]


def liger(at: Inputs, *, compiled: bool) -> Tensor:
    """Return Liger's fused linear JSD loss."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.5, 0.5, beta=0.5, compiled=compiled)
    found: Tensor = loss(at.hidden, at.weight, at.teacher_hidden, at.teacher_weight, at.labels)
    return found


def side(who: str) -> Callable[[Inputs], Tensor]:
    """Return one side's loss."""
    if who.startswith("liger"):
        return lambda at: liger(at, compiled=who == "liger")
    return {"dwindle": dwindle, "naive": naive}[who]


def memory(device: str, *, peak: bool) -> int:
    """Return the bytes this process holds, or held at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak(device: str) -> None:
    """Let the high-water mark start anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def relative_error(at: Inputs) -> float:
    """Return the larger of the two gradients' relative errors (norms) against float64, 32 rows at a time."""
    hidden, weight = at.hidden.detach().double(), at.weight.detach().double()
    teacher, other = at.teacher_hidden.double(), at.teacher_weight.double()
    by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), 32):
        rows = slice(start, start + 32)
        q, p = (hidden[rows] @ weight.t()).softmax(-1), (teacher[rows] @ other.t()).softmax(-1)
        part = q * (q / (0.5 * (p + q))).log()
        slope = 0.25 * (part - q * part.sum(-1, keepdim=True)) + 0.5 * q
        slope.scatter_add_(1, at.labels[rows, None], slope.new_full((slope.shape[0], 1), -0.5))
        slope /= len(hidden)
        by_hidden[rows] = slope @ weight
        by_weight.addmm_(slope.t(), hidden[rows])
    assert at.hidden.grad is not None
    assert at.weight.grad is not None
    pairs = ((at.hidden.grad, by_hidden), (at.weight.grad, by_weight))
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Do one side's job `--calls` times and return its numbers."""
    torch.set_num_threads(options.threads)
    at, loss = Inputs(options), side(options.who)
    (at.hidden[:8].detach() @ at.weight[:8].detach().t()).sum().item()  # the matrix library's own buffers
    if options.who != "liger":  # it would be compiled twice
        loss(Small(at)).backward()
    base = memory(options.device, peak=False)
    seconds, cpu_seconds, peaks, value = [], [], [], 0.0
    for _ in range(options.calls):
        forget_peak(options.device)
        at.hidden.grad = at.weight.grad = None
        wall, cpu = time.perf_counter(), time.process_time()
        found = loss(at)
        found.backward()
        value = found.item()
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
        peaks.append(memory(options.device, peak=True) - base)
    result = {
        "seconds": statistics.median(seconds[1:] or seconds),
        "cpu_seconds": statistics.median(cpu_seconds[1:] or cpu_seconds),
        "first_seconds": seconds[0],
        "peak_over_base_bytes": max(peaks[1:] or peaks),
        "first_peak_over_base_bytes": peaks[0],
        "loss": value,
    }
    return {**result, "gradient_error": relative_error(at)} if options.check else result


class Small(Inputs):
    """The first positions and tokens of the inputs, to load libraries before the memory is read."""

    def __init__(self, at: Inputs) -> None:
        self.hidden, self.weight = (part.detach()[:8].clone().requires_grad_() for part in (at.hidden, at.weight))
        self.teacher_hidden, self.teacher_weight = at.teacher_hidden[:8], at.teacher_weight[:8]
        self.labels = at.labels[:8] % 8


def compare(options: argparse.Namespace, given: list[str]) -> None:
    """Run all sides in turn, in fresh processes, and print medians and ratios to dwindle's."""
    sides = [who for who in SIDES if options.peers or not who.startswith("liger")]
    sides = [who for who in sides if who not in options.skip]
    found: dict[str, list[dict[str, float]]] = {who: [] for who in sides}
    for _ in range(options.runs):
        for who in sides:
            python = options.peers if who.startswith("liger") else sys.executable
            command = [python, "-P", __file__, "--who", who, *given]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[who].append(json.loads(done.stdout.strip().splitlines()[-1]))
    shape = f"{options.positions} positions, width {options.width}, vocabulary {options.vocabulary}"
    print(f"{WORK}: {shape}, {options.dtype}, {options.device}, {options.threads} threads, {options.runs} runs")
    for who in sides:
        for key in found[who][0]:
            ours = statistics.median(run[key] for run in found["dwindle"])
            theirs = statistics.median(run[key] for run in found[who])
            ratio = f"dwindle / {who} {ours / theirs:.3f}" if who != "dwindle" and theirs else ""
            print(f"  {who:12} {key:22} {theirs:<14.6g} {ratio}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def main() -> None:
    """Do one side's job, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=SIDES, help="One side only; without it, all in turn.")
    parser.add_argument("--peers", help="Python of the peers' environment; without it, no Liger.")
    parser.add_argument("--skip", action="append", default=[], choices=SIDES)
    parser.add_argument("--runs", type=int, default=3, help="Fresh processes of each side.")
    parser.add_argument("--json", type=Path, help="Also write all single results here.")
    shared = argparse.ArgumentParser(add_help=False)
    for target in (parser, shared):
        target.add_argument("--positions", type=int, default=1024)
        target.add_argument("--width", type=int, default=1024)
        target.add_argument("--vocabulary", type=int, default=49152)
        target.add_argument("--device", default="cpu")
        target.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
        target.add_argument("--threads", type=int, default=torch.get_num_threads())
        target.add_argument("--calls", type=int, default=3)
        target.add_argument("--check", action="store_true", help="Hold the gradients against float64.")
    options = parser.parse_args()
    if options.who:
        print(json.dumps(measure(options)))
        return
    given = vars(shared.parse_known_args()[0])
    flags = [f"--{name}={value}" for name, value in given.items() if name != "check"]
    compare(options, flags + (["--check"] if options.check else []))


if __name__ == "__main__":
    main()
