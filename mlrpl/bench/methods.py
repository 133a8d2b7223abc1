"""What one step of each method costs: each in a process of its own, so that its peak memory is its own.

`python -m mlrpl.bench.methods METHOD …` is such a process; it prints one line of JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from mlrpl.bench.works import FLOAT32, Size, make_batch, make_method, yardstick
from mlrpl.devices import find_device, peak_memory_mb, seconds
from mlrpl.errors import StudyError
from mlrpl.methods import METHODS, Step
from mlrpl.networks import Encoder, count_parameters, counted_volumes
from mlrpl.optimisation import Optimisation, make_optimizer, to_device
from mlrpl.precision import choose_precision
from mlrpl.process import MALLOC, tune
from mlrpl.training import seed_iteration, stage

PLAIN = "plain"  # MLRPL in the plain formulation
SPARE = 1.5e9  # bytes that a measurement leaves to the rest of the machine
POLL_SECONDS = 0.1


def costs(size: Size, device: str, repeats: int, methods: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row of methods.csv for MLRPL's yardstick and each method, the hungriest last.

    A method that needs more memory than is free gets a row that says so.
    """
    for method in methods or [PLAIN, *(name for name in METHODS if name != "ssnet"), "ssnet"]:
        yield {"method": method, **_measured(method, size, device, repeats)}


def _measured(method: str, size: Size, device: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "mlrpl.bench.methods", method, json.dumps(asdict(size)), device, str(repeats)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **({} if method == PLAIN else MALLOC)},  # as each is run
    )
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if psutil.virtual_memory().available < SPARE:
                process.kill()
                process.communicate()
                return {"note": "needs more memory than was free"}
    finally:
        if process.poll() is None:
            process.kill()
    output, errors = process.communicate()
    if process.returncode:
        if "out of memory" in errors or "can't allocate memory" in errors:
            return {"note": "needs more memory than was free"}
        reason = (errors.strip().splitlines() or ["it ended without a word"])[-1]
        raise StudyError(f"bench: a step of {method} failed: {reason}")
    return {**json.loads(output.splitlines()[-1]), "note": ""}


def measure(name: str, size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of a step (the fastest of `repeats`), peak memory, parameters, and forward passes of one method.

    A first step warms up what is set up once in a process: on a CPU at the smallest patch, for the peak's sake.
    """
    facts: dict[str, Any] = {}
    small = [] if device.type == "cuda" else [(replace(size, patch=(16, 16, 16)), 1)]
    for current, times in (*small, (size, repeats)):
        seed_iteration(0, 0, torch.device("cpu"))
        if name == PLAIN:
            step, facts = _plain_step(current, device)
        else:
            step, facts = method_step(name, current, device)
        if device.type == "cuda":  # the precision's check and cuDNN's search take memory that no step takes
            step()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        facts["seconds"] = min(seconds(step, device) for _ in range(times))
    return {**facts, "peak_memory_mb": peak_memory_mb(device)}


def method_step(
    name: str, size: Size, device: torch.device, compiled: bool = False
) -> tuple[Callable[[], None], dict[str, Any]]:
    """One step of a method as a function to call, and facts about it; the passes are counted when it is called."""
    tune(device)
    method = make_method(name, size, device)
    batch = stage(make_batch(method, size), device)
    precision = choose_precision("auto", method.network, size.patch, sum(size.batch), device)
    if compiled:
        method.compile_parts()
    scaler = precision.scaler(device)
    optimise = Optimisation(method, make_optimizer(method), scaler, precision, device)
    iteration = method.settings.ramp_iterations
    facts: dict[str, Any] = {"precision": precision.name, "parameters": count_parameters(method)}

    def step() -> None:
        generator = seed_iteration(0, iteration, device)
        with counted_volumes(method) as passes:
            where = Step(iteration, method.settings.iterations, generator)
            optimise(batch, where)
        if passes[Encoder]:  # a replay calls no module
            facts.update(passes=len(passes[Encoder]), volumes=sum(passes[Encoder]))

    return step, facts


def _plain_step(size: Size, device: torch.device) -> tuple[Callable[[], object], dict[str, Any]]:
    if device.type == "cuda":  # on a CPU `tune` would keep freed memory, which is not plain
        tune(device)
    network = yardstick().PlainVNet(1, size.classes, size.filters, size.upsamplings).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    batch = to_device(make_batch(make_method("mlrpl", replace(size, filters=1), device), size), device)
    image = batch.image
    facts = {"precision": FLOAT32.name, "parameters": count_parameters(network), "passes": 1, "volumes": len(image)}
    return lambda: yardstick().train_step(network, optimizer, image, batch.label, 0.1), facts


def compiled_step(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """What MLRPL's `compile_parts` gives: seconds of the first step, compilation included, and of later ones.

    Where this machine cannot compile (its back end needs a C compiler), a note instead.
    """
    step, _ = method_step("mlrpl", size, device, compiled=True)
    try:
        first = seconds(step, device)
        return {"first_s": first, "step_s": statistics.median(seconds(step, device) for _ in range(repeats))}
    except Exception as error:  # torch.compile raises whatever its back end does
        return {"note": f"torch.compile failed: {type(error).__name__}"}


def main() -> None:
    """One measurement, as a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("size", type=json.loads)
    parser.add_argument("device")
    parser.add_argument("repeats", type=int)
    given = parser.parse_args()
    size = Size(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.size.items()})
    print(json.dumps(measure(given.method, size, find_device(given.device), given.repeats)))


if __name__ == "__main__":
    main()
