"""The one training loop.

Randomness of iteration k depends on (seed, k) alone: the batch, and PyTorch's global generators, which are seeded anew
for each iteration. A run that is killed anywhere and started again therefore ends with the weights of an undisturbed
one, bit for bit on a CPU.

A run's folder: checkpoint.pt (to resume from), log.csv (a row an iteration), checks.csv (the published protocol's),
audit.csv (where the study asks for an audit), last.pt and published.pt (weights), progress.json (for whoever watches).
"""

import copy
import csv
import io
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mlrpl import audit
from mlrpl.compilation import compilation_pays, lacking
from mlrpl.config import Run
from mlrpl.data import Ahead, Batch, Batches, Store
from mlrpl.devices import device_name, peak_memory_mb
from mlrpl.errors import StoppedError, StudyError
from mlrpl.evaluation import check_dice
from mlrpl.files import atomic, write_json
from mlrpl.interrupt import stop_requests
from mlrpl.memory import is_exhaustion, require
from mlrpl.methods import METHODS, Method, Step, build
from mlrpl.networks import count_parameters, to_channels_last
from mlrpl.optimisation import Optimisation, make_optimizer, restore, set_rate
from mlrpl.precision import Precision, choose_precision
from mlrpl.process import tune
from mlrpl.provenance import environment
from mlrpl.rehearsal import check_signature, rehearse, signature

LOG_COLUMNS = (
    "iteration",
    "total",
    "supervised",
    "mutual",
    "beta",
    "pseudo_foreground",
    "dice",
    "learning_rate",
    "seconds",
)
CHECK_COLUMNS = ("iteration", "dice")
CHECKPOINT_SECONDS = 60  # at most so much work is lost; its timing changes no result
PROGRESS_SECONDS = 2
AHEAD = 3  # batches that a GPU finds ready


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    iteration: int
    iterations: int
    loss: float
    dice: float
    seconds_left: float


def seed_iteration(seed: int, iteration: int, device: torch.device) -> torch.Generator:
    """Seed PyTorch's global generators for one iteration (0: initialisation); returns a generator for the method.

    Python's and NumPy's, too: nothing here draws from them, but a method of one's own may.
    """
    states = np.random.SeedSequence([seed, iteration]).generate_state(2, np.uint64) >> 1
    torch.manual_seed(int(states[0]))
    random.seed(int(states[0]))
    np.random.seed(int(states[0]) % 2**32)  # noqa: NPY002
    return torch.Generator(device).manual_seed(int(states[1]))


def learning_rate(schedule: str, base: float, iteration: int, iterations: int) -> float:
    """Rate of iteration k of K: base; "poly": × (1 − (k−1)/K)^0.9, 0 beyond K; "step": × 0.1 every 2,500 iterations."""
    done = iteration - 1
    factors = {"constant": 1.0, "poly": max(1 - done / iterations, 0) ** 0.9, "step": 0.1 ** (done // 2500)}
    return base * factors[schedule]


class Log:
    """A CSV file that grows by rows and holds no iteration twice: on resuming, rows after the checkpoint are cut."""

    def __init__(
        self, path: Path, columns: tuple[str, ...], resumed_at: int, board: SummaryWriter | None = None
    ) -> None:
        self.path, self.columns, self.board = path, columns, board
        self.waiting: list[dict[str, Any]] = []
        kept = [row for row in read_log(path) if int(row["iteration"]) <= resumed_at]
        with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, **row: Any) -> None:
        """Keep a row until `flush`; tensors are read then, so that the device need not be waited for now."""
        self.waiting.append(row)

    def flush(self) -> None:
        """Append the waiting rows."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        for row in self.waiting:
            values = {name: plain(row.get(name, math.nan)) for name in self.columns}
            writer.writerow(values)
            if self.board:
                for name, value in values.items():
                    if name != "iteration" and value != "":
                        self.board.add_scalar(f"{self.path.stem}/{name}", float(value), values["iteration"])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())
        if self.board:
            self.board.flush()
        self.waiting.clear()


def plain(value: Any) -> Any:
    """A number as it is written: seven significant digits; nothing for what a method does not have."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.7g}"
    return value


def read_log(path: Path) -> list[dict[str, str]]:
    """Whole rows of a log; a last line that a kill cut short is dropped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(lines)))


def save(path: Path, content: dict[str, Any]) -> None:
    """torch.save, atomically; by way of memory, since torch.save itself does not say when a disk is full."""
    data = io.BytesIO()
    torch.save(content, data)
    with atomic(path) as partial:
        partial.write_bytes(data.getbuffer())


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """A file of `save`, by PyTorch's restricted unpickler: no code in it is run.

    Raises:
        StudyError: for a file that cannot be read, is damaged, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise StudyError(f"{path.name}: not there; train the run first") from None
    except OSError as error:  # of permissions or of a file system: nothing says that the weights are lost
        raise StudyError(f"{path.name}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        if isinstance(error, MemoryError) or is_exhaustion(error):
            raise
        raise StudyError(
            f"{path.name}: cannot be read as weights ({type(error).__name__}); delete it and run again"
        ) from None


def stage(batch: Batch, device: torch.device) -> Batch:
    """The batch as a device takes it fastest: images channels-last, for a GPU in pinned memory."""
    image = batch.image.to(memory_format=torch.channels_last_3d)
    return Batch(image.pin_memory(), batch.label.pin_memory()) if device.type == "cuda" else Batch(image, batch.label)


def split_training(run: Run, store: Store, uses_unlabelled: bool) -> tuple[list[str], list[str]]:
    """Ids of the labelled and the unlabelled cases: the first `labelled` of the training list, and all others.

    Raises:
        StudyError: where more labelled cases are asked than exist, or none is left to learn from without label.
    """
    ids = store.ids("train")
    with_label = sum(case["has_label"] for case in store.index["cases"] if case["split"] == "train")
    if run.labelled > with_label:
        raise StudyError(
            f"run {run.name}: {run.labelled} labelled cases asked, but {store.name} has {with_label} for training; "
            f"set labelled: {with_label} or less"
        )
    if not uses_unlabelled:
        return ids[: run.labelled], []
    if run.labelled == len(ids):
        raise StudyError(
            f"run {run.name}: all {len(ids)} training cases are labelled, so {run.method} has none to learn from"
        )
    return ids[: run.labelled], ids[run.labelled :]


def make_batches(run: Run, store: Store, method: Method) -> Batches:
    """The run's batches, its cases read into memory; hidden labels stay out, so that no loss can ever see one."""
    settings, sizes = run.settings, method.batch_sizes(run.settings)
    split = split_training(run, store, sizes[1] > 0)
    cases = [case for ids in split for case in ids]
    advice = "lower the study's batch or patch, or use fewer cases"
    require(store.size(cases) + 8 * sum(settings.batch) * math.prod(settings.patch), f"run {run.name}", advice)
    labelled, unlabelled = ([store.load(case) for case in ids] for ids in split)
    unlabelled = [replace(case, label=None) for case in unlabelled]
    return Batches(labelled, unlabelled, settings.patch, settings.augmentation, run.seed, sizes)


def hidden_labels(run: Run, store: Store) -> dict[str, np.ndarray]:
    """Labels of the unlabelled training cases that have one, by case id: for the audit alone."""
    labels = {case: store.label(case) for case in split_training(run, store, uses_unlabelled=True)[1]}
    return {case: label for case, label in labels.items() if label is not None}


def make_method(run: Run, store: Store, device: torch.device) -> Method:
    """The run's method, freshly initialised from its seed, on the device, channels-last."""
    seed_iteration(run.seed, 0, torch.device("cpu"))
    return to_channels_last(build(run, store.channels, len(store.classes))).to(device)


def not_finite(method: Method) -> set[str]:
    """Names of the parameters and buffers that hold infinities or NaN."""
    values = [*method.named_parameters(), *method.named_buffers()]
    return {name for name, value in values if not value.isfinite().all()}


def check_cases(store: Store) -> list[str]:
    """Where the published protocol selects: the validation cases, or the test cases where a dataset has none."""
    return store.ids("val") or store.ids("test")


class Trainer:
    """One run from wherever its folder says it stands to its last iteration.

    Args:
        run: what to train.
        store: its data.
        folder: where it lives; must exist.
        key: the run's key; a checkpoint of another key is refused.
        device: where to train.
        tensorboard: also write the log for TensorBoard, into the folder's `tensorboard`.
    """

    def __init__(
        self, run: Run, store: Store, folder: Path, key: str, device: torch.device, tensorboard: bool = False
    ) -> None:
        self.run, self.store, self.folder, self.key, self.device = run, store, folder, key, device
        torch.set_num_threads(run.settings.threads)
        tune(device)
        self.method = make_method(run, store, device)
        self.built, self.undefined = signature(self.method), not_finite(self.method)
        self.batches = make_batches(run, store, self.method)
        self.staged = Ahead(
            lambda iteration: stage(self.batches(iteration), device), AHEAD if device.type == "cuda" else 1
        )
        self.checks = [store.load(case) for case in check_cases(store)]
        self.optimizer = make_optimizer(self.method)
        self.iteration = 0
        self.best = -1.0
        self.published: dict[str, Any] | None = None  # weights of the best check
        self.seconds = self.audit_seconds = 0.0
        self.peak_memory_mb = 0
        self.began_with = {**environment(), "device": device_name(device)}
        self.continued_with: list[dict[str, Any]] = []
        self._resume()
        if compilation_pays(device, run.settings.iterations - self.iteration) and not lacking():
            self.method.compile_parts()
        self.optimise = Optimisation(self.method, self.optimizer, self.scaler, self.precision, device)
        board = SummaryWriter(str(folder / "tensorboard"), purge_step=self.iteration + 1) if tensorboard else None
        columns = tuple(dict.fromkeys((*LOG_COLUMNS, *self.method.terms)))
        self.log = Log(folder / "log.csv", columns, self.iteration, board)
        self.check_log = Log(folder / "checks.csv", CHECK_COLUMNS, self.iteration, board)
        self.logs = [self.log, self.check_log]
        self.audit = self._make_audit() if run.audit_every else None

    def _make_audit(self) -> audit.Audit:
        log = Log(self.folder / "audit.csv", audit.COLUMNS, self.iteration)
        self.logs.append(log)
        labels = hidden_labels(self.run, self.store)
        return audit.Audit(self.run.audit_every, self.batches, labels, self.store.classes, log.add, self.audit_seconds)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = load(path, self.device)
            if not isinstance(state, dict) or state.get("key") != self.key:
                raise StudyError(
                    f"{path.name} of run {self.run.name} belongs to other settings; delete it and run again"
                )
            try:
                self._restore(state)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                if is_exhaustion(error):
                    raise
                raise StudyError(
                    f"{path.name} of run {self.run.name}: lacks something ({type(error).__name__}); "
                    "delete it and run again"
                ) from None
        else:
            settings, volumes = self.run.settings, sum(self.batches.sizes)
            self.precision = choose_precision(
                settings.precision, self.method.network, settings.patch, volumes, self.device, self.store.channels
            )
            self.scaler = self.precision.scaler(self.device)
        if not self.precision.reduced:
            torch.backends.cudnn.allow_tf32 = False  # which PyTorch would take for a GPU's convolutions

    def _restore(self, state: dict[str, Any]) -> None:
        self.precision = Precision(state["precision"], state["reason"])
        self.scaler = self.precision.scaler(self.device)
        self.scaler.load_state_dict(state["scaler"])
        self.method.load_state_dict(state["method"])
        restore(self.optimizer, state["optimizer"])
        self.iteration, self.best, self.seconds = state["iteration"], state["best"], state["seconds"]
        self.published = state["published"]
        self.audit_seconds = state.get("audit_seconds", 0.0)
        self.peak_memory_mb, now = state["peak_memory_mb"], self.began_with
        self.began_with, self.continued_with = state["began_with"], list(state.get("continued_with", []))
        before = self.began_with | (self.continued_with[-1] if self.continued_with else {})
        if other := {name: value for name, value in now.items() if before.get(name) != value}:
            self.continued_with.append({"from_iteration": self.iteration, **other})

    def step(self, iteration: int) -> dict[str, Any]:
        """One step of training, that of the iteration given (from 1); returns its terms, still on the device."""
        settings = self.run.settings
        step = self._begun(iteration)
        rate = learning_rate(settings.lr_schedule, settings.learning_rate, iteration, settings.iterations)
        set_rate(self.optimizer, rate)
        auditing = self.audit.observing(self.method.network, iteration) if self.audit else nullcontext(False)
        with auditing as observed:
            terms = self.optimise(self.staged(iteration), step, observed)
        return {**terms, "learning_rate": rate}

    def _begun(self, iteration: int) -> Step:
        return Step(iteration, self.run.settings.iterations, seed_iteration(self.run.seed, iteration, self.device))

    def _rehearse(self) -> None:
        """A method of one's own may not do what is taken for granted of the package's: better said now than later."""
        rehearse(
            lambda: make_method(self.run, self.store, self.device),
            lambda iteration: stage(self.batches(iteration), self.device),
            self._begun,
            self.precision,
            self.device,
        )

    def _weights(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "iteration": self.iteration,
            "precision": self.precision.name,
            "method": self.method.state_dict(),
        }

    def _checkpoint(self) -> None:
        """The log first: rows without a checkpoint are cut on resuming, a checkpoint without rows would leave a gap.

        Weights that are not finite never take the place of good ones, also where the last loss still was.
        """
        if lost := not_finite(self.method) - self.undefined:
            raise self._diverged(f"{min(lost)} is not finite")
        check_signature(self.method, self.built)
        for log in self.logs:
            log.flush()
        self.peak_memory_mb = max(self.peak_memory_mb, peak_memory_mb(self.device))
        save(
            self.folder / "checkpoint.pt",
            {
                **self._weights(),
                "reason": self.precision.reason,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "published": self.published,
                "seconds": self.seconds,
                "audit_seconds": self.audit.seconds if self.audit else 0.0,
                "peak_memory_mb": self.peak_memory_mb,
                "began_with": self.began_with,
                "continued_with": self.continued_with,
            },
        )

    def _check(self) -> float:
        dice = check_dice(self.method, self.checks, self.device, self.precision)
        self.check_log.add(iteration=self.iteration, dice=dice)
        if dice > self.best:
            # In the checkpoint, not in a file ahead of it: a GPU, where iterations done again give slightly other
            # weights, might never reach that Dice again.
            self.best, self.published = dice, copy.deepcopy(self._weights())
        return dice

    def train(self, watch: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Train to the end.

        Args:
            watch: called every few seconds.

        Returns:
            What provenance records: precision, parameters, seconds, peak memory, and what the run began with.

        Raises:
            StudyError: where the loss is not finite; the last good checkpoint stays. Before the first step of a method
                of one's own also what `mlrpl.rehearsal` raises.
            StoppedError: on Ctrl-C or SIGTERM, when the checkpoint is written.
        """
        with stop_requests() as asked:
            if self.iteration == 0 and self.run.method not in METHODS:
                self._rehearse()
            return self._train(watch, asked)

    def _train(self, watch: Callable[[Progress], None] | None, asked: Event) -> dict[str, Any]:
        iterations = self.run.settings.iterations
        started, offset = time.monotonic(), self.seconds
        saved = watched = started
        first = self.iteration
        while self.iteration < iterations:
            terms = self.step(self.iteration + 1)
            if self.iteration == first and self.device.type == "cuda":
                # The precision's check and cuDNN's search took memory that no step takes.
                torch.cuda.reset_peak_memory_stats(self.device)
            self.iteration += 1
            now = time.monotonic()
            self.seconds = offset + now - started
            self.log.add(iteration=self.iteration, seconds=self.seconds, **terms)
            stopping = asked.is_set()
            due = now - saved > CHECKPOINT_SECONDS or self.iteration == iterations or stopping
            if now - watched > PROGRESS_SECONDS or due or self.iteration == 1:
                watched = now
                self._watch(terms, first, now - started, watch)
            if self.run.settings.is_check(self.iteration):
                self._check()
            if due:
                self._checkpoint()
                saved = time.monotonic()
            if stopping and self.iteration < iterations:
                raise StoppedError(
                    f"run {self.run.name}: interrupted, its checkpoint is at iteration {self.iteration} of "
                    f"{iterations}; the same command goes on from there"
                )
        if self.best < 0:  # a run too short for any check
            self._check()
            self._checkpoint()
        save(self.folder / "published.pt", self.published)
        save(self.folder / "last.pt", self._weights())
        return {
            "precision": self.precision.name,
            "precision_reason": self.precision.reason,
            "compiled": self.method.compiled,
            "replayed": self.optimise.replays,
            "parameters": count_parameters(self.method),
            "seconds": round(self.seconds, 1),
            **({"audit_seconds": round(self.audit.seconds, 2)} if self.audit else {}),
            "peak_memory_mb": self.peak_memory_mb,
            **self.began_with,
            **({"continued_with": self.continued_with} if self.continued_with else {}),
        }

    def _diverged(self, what: str) -> StudyError:
        """The iteration named is the first with a bad loss, which may be some before the one that noticed it."""
        bad = next((row["iteration"] for row in self.log.waiting if not math.isfinite(row["total"])), self.iteration)
        kept = "the last good checkpoint is kept; " if (self.folder / "checkpoint.pt").exists() else ""
        advice = "try a lower learning_rate, or precision: float32" if bad > 1 else "look at the method's loss"
        return StudyError(f"run {self.run.name}: {what} at iteration {bad}; {kept}{advice}")

    def _watch(
        self, terms: dict[str, Any], first: int, elapsed: float, watch: Callable[[Progress], None] | None
    ) -> None:
        loss = terms["total"].item()
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        left = elapsed / (self.iteration - first) * (self.run.settings.iterations - self.iteration)
        dice = terms["dice"].item() if "dice" in terms else math.nan
        progress = Progress(self.iteration, self.run.settings.iterations, loss, dice, left)
        write_json(self.folder / "progress.json", progress.__dict__)
        if watch:
            watch(progress)


@contextmanager
def progress_bar(run: Run) -> Iterator[Callable[[Progress], None]]:
    """A bar with loss, Dice of the training batch and time left, for `Trainer.train`'s `watch`."""
    with tqdm(total=run.settings.iterations, desc=run.name, unit="it") as bar:

        def watch(progress: Progress) -> None:
            if not bar.n:  # of a run that goes on, what was done before is no speed of this sitting's
                bar.initial = progress.iteration
            bar.n = progress.iteration
            bar.set_postfix(loss=f"{progress.loss:.3f}", dice=f"{progress.dice:.2f}")

        yield watch
