"""All measurements in order, and what is written: bench.csv, growth.csv, methods.csv, profile.csv, figure and page."""

import importlib.util
import math
import time
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
from mlrpl.devices import find_device
from mlrpl.errors import StudyError
from mlrpl.files import atomic, write_json
from mlrpl.provenance import environment

COSTS = ["method", "seconds", "peak_memory_mb", "parameters", "passes", "volumes", "precision", "note"]
QUICK = Size((32, 32, 16), 2)
MEMORY_GOAL = 1 / 0.7  # peak memory of a step: 30 % below the plain formulation's


def main_works(quick: bool, device: torch.device) -> Iterator[tuple[int, Callable[[], Iterator[Work]]]]:
    """(repeats, works) at the size that the goals are for; made when their turn comes, so that memory is free then."""
    size, volume, stride = (QUICK, (40, 36, 17), (16, 16, 8)) if quick else (LA, (130, 120, 84), (18, 18, 4))
    mask, cases = ((40, 36, 24), 1) if quick else ((150, 140, 88), 3)
    repeats = 2 if quick or device.type == "cpu" else 10
    # Goals hold at LA size, on a CPU; a GPU's is that of a whole run.
    step, loss, window, metric = (5, 12, 8, 5) if device.type == "cpu" and not quick else (None,) * 4
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
    minutes: float | None = None,
) -> Path:
    """Measure everything and write `<results>/bench`; a GPU's figures go to `<results>/bench-cuda`.

    Args:
        results: folder of results.
        device: where to measure; default: a GPU where there is one.
        quick: tiny sizes that show nothing but that it works.
        say: called with a line for each measurement.
        minutes: after which nothing more is begun; what has not been measured is left out of the page.

    Returns:
        The page.

    Raises:
        StudyError: for a device that is not there, or where both formulations differ.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    place = find_device(device)
    machine = hardware.capabilities(place)
    say(", ".join(f"{name}: {value}" for name, value in machine.items()))
    measured = Bench(Path(results), place, quick, machine, say, until)
    parts = [measured.methods, measured.works, measured.growth, measured.profile]
    if place.type == "cuda":  # the most important first, where time may be short
        parts = [measured.works, measured.profile, measured.methods, measured.growth]
    for part in parts:
        part()
    return measured.finish()


class Bench:
    """The parts of a bench. Each writes what it has measured at once: what is cut off later keeps what it has.

    On a CPU `methods` comes first, since `works` makes this process keep what memory it takes.

    Args:
        results: folder of results.
        device: where to measure.
        quick: at tiny sizes.
        machine: see `hardware.capabilities`.
        say: called with a line for each measurement.
        until: on time.monotonic's clock, when nothing more is begun.
    """

    def __init__(
        self,
        results: Path,
        device: torch.device,
        quick: bool,
        machine: dict[str, Any],
        say: Callable[[str], None],
        until: float,
    ) -> None:
        self.device, self.quick, self.machine, self.say, self.until = device, quick, machine, say, until
        self.folder = results / ("bench" if device.type == "cpu" else f"bench-{device.type}")
        self.size = QUICK if quick else LA
        self.alone = 3 if device.type == "cpu" else 10  # repeats of a method's step
        self.tables = {name: pd.DataFrame() for name in ("bench", "growth", "methods", "profile")}
        self.speed: dict[str, Any] = {}

    def _keep(self, name: str, rows: list[dict[str, Any]] | pd.DataFrame) -> None:
        self.tables[name] = pd.DataFrame(rows)
        with atomic(self.folder / f"{name}.csv") as partial:
            self.tables[name].to_csv(partial, index=False, float_format="%.6g")

    def _keep_provenance(self) -> dict[str, Any]:
        provenance = {
            "title": "Speed" if self.device.type == "cpu" else "Speed on a GPU",
            "summary": f"the package beside its plain formulation; {self.machine['device']}",
            "machine": self.machine,
            "speed": self.speed,
            **environment(),
        }
        write_json(self.folder / "provenance.json", provenance)
        return provenance

    def _late(self) -> bool:
        return time.monotonic() > self.until

    def methods(self) -> None:
        """A step of each method, a process each."""
        spent = []
        for cost in costs(self.size, str(self.device), self.alone):
            spent.append(cost)
            told = cost["note"] or f"{cost['seconds']:.3g} s, {cost['peak_memory_mb']} MB"
            self.say(f"step of {cost['method']}, {self.size.setting}: {told}")
            self._keep("methods", _compared(pd.DataFrame(spent)))
            if self._late():
                return

    def works(self) -> None:
        """Each piece of work in both formulations."""
        rows: list[dict[str, Any]] = []
        for repeats, works in main_works(self.quick, self.device):
            for work in works():
                rows.append(_said(compare(work, repeats, self.device, self.machine["precision"]), self.say))
                self._keep("bench", rows)
                if self._late():
                    return

    def growth(self) -> None:
        """How the cost of a step, and of a check, grows."""
        grown: list[dict[str, Any]] = []
        for what, value, work in growth(QUICK if self.quick else Size(), self.quick, self.device):
            if self._late():
                return
            row = compare(work, 2 if self.quick else 3, self.device, self.machine["precision"])
            grown.append({"grows": what, "value": value, **_said(row, self.say)})
            self._keep("growth", grown)

    def profile(self) -> None:
        """What a step computes and moves, beside what this machine can do, and its timeline."""
        work = training_step(self.size, self.device)
        (row,) = self.tables["bench"].query("work == @work.name").to_dict("records")
        work.ours()  # recorded by a GPU later, so each operation is still seen here
        step = hardware.achieved(work.ours, row["ours_s"])
        self.speed |= {"ceiling": hardware.ceilings(self.device, self.quick), "step": step}
        self._keep_provenance()
        if self.device.type == "cuda":
            self.speed["compiled"] = compiled_step(self.size, self.device, 10)
            for _ in range(work.warm_up):
                work.ours()
        self._keep("profile", hardware.timeline(work.ours, self.device, self.folder / "step-trace.json.gz"))

    def finish(self) -> Path:
        """Write the page.

        Raises:
            StudyError: where both formulations differ.
        """
        self._keep("bench", [*self.tables["bench"].to_dict("records"), *self._rows_as_run()])
        page = write_page(self.folder, self.tables, self._keep_provenance(), self.size)
        rows = pd.concat([self.tables["bench"], self.tables["growth"]])
        if different := list(rows.loc[~rows["equal"].astype(bool), "work"]):
            raise StudyError(f"bench: both formulations differ in: {', '.join(different)}; see {page}")
        return page

    def _rows_as_run(self) -> list[dict[str, Any]]:
        """What a step takes in a process of its own, as rows of bench.csv: seconds, and peak memory.

        Of memory, the columns of seconds hold gigabytes, and the row's name says so.
        """
        methods = self.tables["methods"]
        if not {PLAIN, "mlrpl"} <= set(methods.get("method", ())):
            return []
        costs = methods.set_index("method")

        def row(work: str, spent: pd.Series, repeats: int, goal: float | None) -> dict[str, Any]:
            ratio = spent[PLAIN] / spent["mlrpl"]
            return {
                "work": work,
                "setting": self.size.setting,
                "ours_s": spent["mlrpl"],
                "plain_s": spent[PLAIN],
                "ratio": ratio,
                "goal": goal,
                "verdict": verdict(ratio, goal, False, "") if ratio == ratio else "not measured",
                "equal": True,
                "repeats": repeats,
            }

        goal = None if self.quick else MEMORY_GOAL
        return [
            row("training step, a process each", costs["seconds"], self.alone, None),
            row("peak memory of a step (GB)", costs["peak_memory_mb"] / 1000, 1, goal),
        ]


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
    methods["ratio_to_vnet"] = methods["seconds"] / (vnet.iloc[0] if len(vnet) else math.nan)
    return methods
