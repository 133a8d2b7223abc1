"""Timing two ways of doing the same work, alternately, in one process."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlrpl.devices import seconds
from mlrpl.precision import as_it_comes
from mlrpl.process import tune

TOLERANCE = 1e-4  # of losses, gradients and probabilities in float32, relative to the largest


@dataclass(frozen=True)
class Work:
    """One piece of work in both formulations.

    Attributes:
        name: what is done.
        setting: at which size.
        ours: the package's way.
        plain: the yardstick's.
        difference: runs both once, in float32 (gradients: also in double, at a small size), and returns the largest
            relative difference of their results.
        goal: how many times faster the package is to be; None for a figure without a goal.
        needs_bf16: whether the goal was set for hardware with bf16 instructions.
        tolerance: of `difference`.
        warm_up: calls of `ours` on a GPU after which it runs as it does from then on.
    """

    name: str
    setting: str
    ours: Callable[[], object]
    plain: Callable[[], object]
    difference: Callable[[], float]
    goal: float | None = None
    needs_bf16: bool = False
    tolerance: float = TOLERANCE
    warm_up: int = 1


def compare(work: Work, repeats: int, device: torch.device, precision: str) -> dict[str, object]:
    """A row of bench.csv: medians of alternate repeats and their spread; the ratio is the median of the pairs' ratios.

    The process is tuned as for training. Equality is checked first, which also warms both ways up; on a GPU the
    precisions that are timed take a call more.
    """
    tune(device)
    with as_it_comes():
        difference = work.difference()
    if device.type == "cuda":  # cuDNN's search for the precisions that are timed
        for _ in range(work.warm_up):
            work.ours()
        work.plain()
    ours, plain = [], []
    for _ in range(repeats):
        ours.append(seconds(work.ours, device))
        plain.append(seconds(work.plain, device))
    ratio = statistics.median(p / o for o, p in zip(ours, plain, strict=True))
    return {
        "work": work.name,
        "setting": work.setting,
        "ours_s": statistics.median(ours),
        "plain_s": statistics.median(plain),
        "ratio": ratio,
        "goal": work.goal,
        "verdict": verdict(ratio, work.goal, work.needs_bf16, precision),
        "difference": difference,
        "tolerance": work.tolerance,
        "equal": difference <= work.tolerance,
        "repeats": repeats,
        "ours_low_s": min(ours),
        "ours_high_s": max(ours),
        "plain_low_s": min(plain),
        "plain_high_s": max(plain),
    }


def verdict(ratio: float, goal: float | None, needs_bf16: bool, precision: str) -> str:
    """What a ratio says about its goal: "met", "missed", "not applicable" (no bf16 here) or nothing."""
    if goal is None:
        return ""
    if needs_bf16 and precision == "float32":
        return "not applicable"
    return "met" if ratio >= goal else "missed"


def relative(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of the yardstick; infinite where either is not finite."""
    ours, plain = ours.detach().double().cpu(), plain.detach().double().cpu()
    error = ((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-12)).item()
    return error if error == error else float("inf")
