"""All measurements in order, and what is written: bench.csv, growth.csv, methods.csv, profile.csv, figure and page."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mlrpl.bench import hardware
from mlrpl.bench.methods import PLAIN, compiled_step, costs
from mlrpl.bench.page import write_page
from mlrpl.bench.timing import Work, compare, verdict
from mlrpl.bench.works import LA, Size, growth, library_window, metrics, mutual_losses, sliding_windows, training_step
from mlrpl.errors import StudyError
from mlrpl.files import atomic, write_json
from mlrpl.process import tune
from mlrpl.provenance import environment
from mlrpl.training import find_device

COSTS = ["method", "seconds", "peak_memory_mb", "parameters", "passes", "volumes", "precision", "note"]
QUICK = Size((32, 32, 16), 2)
MEMORY_GOAL = 1 / 0.7  # peak memory of a step: 30 % below the plain formulation's


def main_works(quick: bool, device: torch.device) -> Iterator[tuple[int, Callable[[], Iterator[Work]]]]:
    """(repeats, works) at the size that the goals are for; made when their turn comes, so that memory is free then."""
    size, volume, stride = (QUICK, (40, 36, 17), (16, 16, 8)) if quick else (LA, (130, 120, 84), (18, 18, 4))
    mask, cases = ((40, 36, 24), 1) if quick else ((150, 140, 88), 3)
    repeats = 2 if quick or device.type == "cpu" else 10
    step, loss, window, metric = (None,) * 4 if quick else (5, 12, 8, 5)  # goals hold at LA size
    yield repeats, lambda: iter([training_step(size, device, step)])
    yield repeats + 1, lambda: iter([mutual_losses(size, device, loss)])
    yield repeats, lambda: sliding_windows(size, volume, stride, device, window)
    if importlib.util.find_spec("monai"):
        yield repeats, lambda: iter([library_window(size, volume, stride, device)])
    if device.type == "cpu":  # distances are measured on the processor, wherever the network is
        yield repeats + 1, lambda: metrics(mask, cases, metric)


def bench(
    results: str = "results",
    device: str | None = None,
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure everything and write `<results>/bench`; a GPU's figures go to `<results>/bench-cuda`.

    Args:
        results: folder of results.
        device: where to measure; default: a GPU where there is one.
        quick: tiny sizes that show nothing but that it works.
        say: called with a line for each measurement.

    Returns:
        The page.

    Raises:
        StudyError: for a device that is not there, or where both formulations differ.
    """
    place = find_device(device)
    machine = hardware.capabilities(place)
    say(", ".join(f"{name}: {value}" for name, value in machine.items()))
    folder = Path(results) / ("bench" if place.type == "cpu" else f"bench-{place.type}")
    size = QUICK if quick else LA

    tables: dict[str, pd.DataFrame] = {}

    def keep(name: str, rows: list[dict[str, Any]] | pd.DataFrame) -> None:
        """Written at once: a measurement that is cut off later keeps what it has."""
        tables[name] = pd.DataFrame(rows)
        with atomic(folder / f"{name}.csv") as partial:
            tables[name].to_csv(partial, index=False, float_format="%.6g")

    # First, since this process will keep what memory it takes from then on.
    spent, alone = [], 3 if place.type == "cpu" else 10
    for cost in costs(size, str(place), alone):
        spent.append(cost)
        told = cost["note"] or f"{cost['seconds']:.3g} s, {cost['peak_memory_mb']} MB"
        say(f"step of {cost['method']}, {size.setting}: {told}")
    methods = _compared(pd.DataFrame(spent))
    keep("methods", methods)

    tune(place)
    rows: list[dict[str, Any]] = []
    for repeats, works in main_works(quick, place):
        for work in works():
            rows.append(_said(compare(work, repeats, place, machine["precision"]), say))
            keep("bench", rows)
    rows += _rows_as_run(methods, size, alone, None if quick else MEMORY_GOAL)
    keep("bench", rows)

    grown: list[dict[str, Any]] = []
    for what, value, work in growth(QUICK if quick else Size(), quick, place):
        row = compare(work, 2 if quick else 3, place, machine["precision"])
        grown.append({"grows": what, "value": value, **_said(row, say)})
        keep("growth", grown)

    work = training_step(size, place)
    took = min(row["ours_s"] for row in rows if row["work"] == work.name)
    work.ours()
    speed: dict[str, Any] = {"ceiling": hardware.ceilings(place, quick), "step": hardware.achieved(work.ours, took)}
    if place.type == "cuda":
        speed["compiled"] = compiled_step(size, place, 10)
    keep("profile", hardware.timeline(work.ours, place, folder / "step-trace.json.gz"))

    provenance = {
        "title": "Speed" if place.type == "cpu" else "Speed on a GPU",
        "summary": f"the package beside its plain formulation; {machine['device']}",
        "machine": machine,
        "speed": speed,
        **environment(),
    }
    write_json(folder / "provenance.json", provenance)
    page = write_page(folder, tables, provenance, size)
    different = [row["work"] for row in [*rows, *grown] if not row["equal"]]
    if different:
        raise StudyError(f"bench: both formulations differ in: {', '.join(different)}; see {page}")
    return page


def _said(row: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    goal = f" (goal {row['goal']:g}: {row['verdict']})" if row["goal"] else ""
    say(
        f"{row['work']}, {row['setting']}: {row['ours_s']:.3g} s, plain {row['plain_s']:.3g} s, "
        f"{row['ratio']:.2f}×{goal}, difference {row['difference']:.1e}"
    )
    return row


def _compared(methods: pd.DataFrame) -> pd.DataFrame:
    """With each step's ratio to V-Net's; columns that a step without enough memory leaves empty are there."""
    methods = methods.reindex(columns=COSTS)
    vnet = methods.loc[methods["method"] == "vnet", "seconds"]
    methods["ratio_to_vnet"] = methods["seconds"] / vnet.iloc[0]
    return methods


def _rows_as_run(methods: pd.DataFrame, size: Size, repeats: int, goal: float | None) -> list[dict[str, Any]]:
    """What a step takes in a process of its own, as rows of bench.csv: seconds, and peak memory.

    Of memory, the columns of seconds hold gigabytes, and the row's name says so.
    """
    costs = methods.set_index("method")

    def row(work: str, spent: pd.Series, repeats: int, goal: float | None) -> dict[str, Any]:
        ratio = spent[PLAIN] / spent["mlrpl"]
        return {
            "work": work,
            "setting": size.setting,
            "ours_s": spent["mlrpl"],
            "plain_s": spent[PLAIN],
            "ratio": ratio,
            "goal": goal,
            "verdict": verdict(ratio, goal, False, "") if ratio == ratio else "not measured",
            "equal": True,
            "repeats": repeats,
        }

    return [
        row("training step, a process each", costs["seconds"], repeats, None),
        row("peak memory of a step (GB)", costs["peak_memory_mb"] / 1000, 1, goal),
    ]
