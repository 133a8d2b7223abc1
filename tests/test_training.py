"""The training loop: killed anywhere it ends with the same bits, and what it must never do it does not."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlrpl import training
from mlrpl.config import Dataset, Run
from mlrpl.data import Store, open_store, prepare
from mlrpl.devices import find_device
from mlrpl.errors import StoppedError, StudyError
from mlrpl.files import read_json
from mlrpl.methods import METHODS, Step
from mlrpl.methods.mlrpl import MLRPL
from mlrpl.training import (
    Trainer,
    check_cases,
    learning_rate,
    load,
    make_batches,
    make_method,
    read_log,
    seed_iteration,
    split_training,
)

CPU = torch.device("cpu")
KEY = "0123456789abcdef"
SETTINGS = {
    "patch": (16, 16, 16), "stride": (8, 8, 16), "filters": 2, "iterations": 12, "ramp_iterations": 150,
    "check_from": 4, "check_every": 4, "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    dataset = Dataset(name="tiny", source="phantom", options={"train": 4, "test": 1, "size": [24, 24, 16]})
    return prepare(dataset, None, tmp_path_factory.mktemp("stores") / "tiny")


def example(method: str = "mlrpl", labelled: int = 2, seed: int = 0, options: dict | None = None, **settings) -> Run:
    return Run.model_validate({
        "study": "tiny", "variant": method, "method": method, "title": method, "labelled": labelled, "seed": seed,
        "settings": {**SETTINGS, **settings}, "options": options or {},
    })  # fmt: skip


def train(run: Run, store: Store, folder: Path, key: str = KEY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Trainer(run, store, folder, key, CPU).train()
    return folder


@pytest.fixture
def checkpoints_every(monkeypatch):
    """Let checkpoints depend on the iteration instead of the clock."""

    def every(iterations: int) -> None:
        step = Trainer.step

        def stepped(self, iteration):
            monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1 if iteration % iterations == 0 else math.inf)
            return step(self, iteration)

        monkeypatch.setattr(Trainer, "step", stepped)

    return every


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load(path, CPU)["method"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log_without_seconds(folder: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO((folder / "log.csv").read_text())))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_undisturbed(folder: Path, reference: Path) -> None:
    """Weights of both selections, log and checks are those of the reference, and nothing else is left."""
    for name in ("last.pt", "published.pt"):
        assert equal(weights(folder / name), weights(reference / name)), name
        assert load(folder / name, CPU)["iteration"] == load(reference / name, CPU)["iteration"]
    rows = log_without_seconds(folder)
    assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1))
    assert rows == log_without_seconds(reference)
    assert (folder / "checks.csv").read_bytes() == (reference / "checks.csv").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in reference.iterdir())


# Killed.

CHILD = """
import os, signal, sys, time
from pathlib import Path
import torch
from mlrpl import training
from mlrpl.config import Run
from mlrpl.data import open_store

run, store, folder, key, moment, at, every, pause = sys.argv[1:]
at, every, pause = int(at), int(every), float(pause)
step, flush, save, write, now = training.Trainer.step, training.Log.flush, training.save, Path.write_bytes, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def stepped(self, iteration):
    global now
    now = iteration
    training.CHECKPOINT_SECONDS = -1 if iteration % every == 0 else float("inf")
    terms = step(self, iteration)
    time.sleep(pause)
    if moment == "step" and iteration == at:
        die()
    return terms

def flushed(self):
    flush(self)
    if moment == "log" and now == at:
        die()

def written(self, data):
    if moment == "write" and now == at:
        write(self, data[: len(data) // 2])
        die()
    return write(self, data)

def saved(path, content):
    save(path, content)
    if moment == "save" and now == at:
        die()

training.Trainer.step, training.Log.flush, training.save, Path.write_bytes = stepped, flushed, saved, written
run = Run.model_validate_json(run)
training.Trainer(run, open_store(store), Path(folder), key, torch.device("cpu")).train()
"""


def start_child(
    run: Run, store: Store, folder: Path, moment: str = "", at: int = 0, every: int = 3, pause: float = 0
) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [run.model_dump_json(), str(store.folder), str(folder), KEY, moment, str(at), str(every), str(pause)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.PIPE, text=True)


def killed_child(*arguments) -> None:
    process = start_child(*arguments)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, errors


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> Path:
    return train(example(iterations=20), store, tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.mark.parametrize(("moment", "at", "rows"), [
    ("step", 13, 12),  # after an optimiser step, between two checkpoints
    ("log", 9, 9),  # the log is written, its checkpoint is not
    ("save", 9, 9),  # a checkpoint is written, and nothing after it
    ("write", 15, 15),  # a checkpoint is half-written
    ("step", 2, 0),  # before the first checkpoint
], ids=str)  # fmt: skip
@pytest.mark.fault("kill -9 in train")
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(store, undisturbed, tmp_path, moment, at, rows):
    folder = tmp_path / "run"
    killed_child(example(iterations=20), store, folder, moment, at)
    assert not (folder / "last.pt").exists()
    assert len(read_log(folder / "log.csv")) == rows
    assert (folder / "checkpoint.pt").exists() == (at > 3)
    for partial in folder.glob(".*.partial"):  # what the study clears away before a run goes on
        partial.unlink()
    train(example(iterations=20), store, folder)
    assert_undisturbed(folder, undisturbed)


def test_published_weights_are_right_where_iterations_done_again_would_differ(
    store, tmp_path, monkeypatch, checkpoints_every
):
    """As on a GPU: the check that was best before the kill is not the best when it is done again."""
    checkpoints_every(5)
    run, scores, step = example(iterations=8), {4: 0.5, 8: 0.1}, Trainer.step
    monkeypatch.setattr(training, "check_dice", lambda *_: scores[trainer.iteration])
    monkeypatch.setattr(Trainer, "step", lambda self, k: step(self, k) if k < 7 else 1 / 0)
    trainer = Trainer(run, store, tmp_path, KEY, CPU)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / "published.pt").exists()
    best = trainer.published["method"]
    monkeypatch.setattr(Trainer, "step", step)
    scores[4] = 0.05
    trainer = Trainer(run, store, tmp_path, KEY, CPU)
    trainer.train()
    assert load(tmp_path / "published.pt", CPU)["iteration"] == 4
    assert equal(weights(tmp_path / "published.pt"), best)
    assert [float(row["dice"]) for row in read_log(tmp_path / "checks.csv")] == [0.5, 0.1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.fault("Ctrl-C or SIGTERM")
def test_asked_to_end_it_finishes_the_checkpoint_and_says_how_to_go_on(store, tmp_path, monkeypatch, number):
    run, folder, step = example(), tmp_path / "run", Trainer.step
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def stepped(self, iteration):
        if iteration == 7:
            os.kill(os.getpid(), number)
        return step(self, iteration)

    monkeypatch.setattr(Trainer, "step", stepped)
    with pytest.raises(StoppedError, match="its checkpoint is at iteration 7 of 12; the same command goes on"):
        train(run, store, folder)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load(folder / "checkpoint.pt", CPU)["iteration"] == 7
    monkeypatch.setattr(Trainer, "step", step)
    assert_undisturbed(train(run, store, folder), train(run, store, tmp_path / "reference"))


def test_a_run_that_goes_on_elsewhere_says_so(store, tmp_path, monkeypatch, checkpoints_every):
    checkpoints_every(5)
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, k: step(self, k) if k < 7 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(example(), store, tmp_path)
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(training, "environment", lambda: {"commit": "another", "python": "3.99"})
    facts = Trainer(example(), store, tmp_path, KEY, CPU).train()
    assert facts["commit"] != "another"
    assert facts["continued_with"] == [{"from_iteration": 5, "commit": "another", "python": "3.99"}]


def test_killed_by_surprise_and_again_while_resuming(store, tmp_path):
    """SIGKILL from outside at a random moment, twice, with a checkpoint at every iteration."""
    run = example(iterations=60, check_from=20, check_every=20)
    folder, delays = tmp_path / "run", [random.uniform(0, 0.5) for _ in range(2)]
    reached = 0
    for delay in delays:
        process = start_child(run, store, folder, "", 0, 1, 0.03)
        checkpoint = folder / "checkpoint.pt"
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            if checkpoint.exists() and load(checkpoint, CPU)["iteration"] > reached:
                break
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{errors} {delays}"
        now = load(checkpoint, CPU)["iteration"]
        assert reached < now < 60, delays
        reached = now
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    train(run, store, folder)
    assert_undisturbed(folder, train(run, store, tmp_path / "reference"))


def test_a_run_in_the_hardwares_own_precision_resumes_too(store, tmp_path):
    """In bf16 where the CPU has it: the choice is kept in the checkpoint."""
    run = example(iterations=6, patch=(48, 32, 16), precision="auto", check_from=3, check_every=3)
    killed_child(run, store, tmp_path / "run", "step", 5, 2)
    resumed = Trainer(run, store, tmp_path / "run", KEY, CPU)
    assert resumed.iteration == 4
    reference = train(run, store, tmp_path / "reference")
    assert resumed.precision.name == load(reference / "last.pt", CPU)["precision"]
    resumed.train()
    assert_undisturbed(tmp_path / "run", reference)


def test_resuming_does_not_ask_the_hardware_again(store, tmp_path, monkeypatch, checkpoints_every):
    """Half a run in one precision and half in another would be neither."""
    checkpoints_every(2)
    chosen = training.Precision("float32", "a reason")
    monkeypatch.setattr(training, "choose_precision", lambda *_: chosen)
    trainer = Trainer(example(precision="auto"), store, tmp_path, KEY, CPU)
    trainer.step(1)
    trainer.iteration = 1
    trainer._checkpoint()
    monkeypatch.setattr(training, "choose_precision", lambda *_: pytest.fail("asked again"))
    assert Trainer(example(precision="auto"), store, tmp_path, KEY, CPU).precision == chosen


def test_float16_skips_a_step_whose_gradients_overflow_and_remembers_its_scale(store, tmp_path):
    """As on a GPU without bf16; the log has the loss as it is, not as it was scaled."""
    trainer = Trainer(example(precision="float16", iterations=4), store, tmp_path, KEY, CPU)
    assert trainer.precision.name == "float16"
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    before = {name: value.clone() for name, value in trainer.method.named_parameters()}
    loss = trainer.step(1)["total"]
    assert 0 < loss < 10
    assert equal(before, dict(trainer.method.named_parameters()))
    assert trainer.scaler.get_scale() == 2.0**39

    trainer.iteration = 1
    trainer._checkpoint()
    resumed = Trainer(trainer.run, store, tmp_path, KEY, CPU)
    assert resumed.scaler.get_scale() == 2.0**39
    assert resumed.scaler.is_enabled()


def test_a_finished_run_is_not_stepped_again(store, undisturbed, tmp_path, monkeypatch):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained again"))
    train(example(iterations=20), store, folder)
    assert_undisturbed(folder, undisturbed)


def test_the_same_run_twice_is_the_same_and_another_seed_another(store, undisturbed, tmp_path):
    assert_undisturbed(train(example(iterations=20), store, tmp_path / "again"), undisturbed)
    other = train(example(iterations=20, seed=1), store, tmp_path / "other")
    assert not equal(weights(other / "last.pt"), weights(undisturbed / "last.pt"))


def test_a_line_cut_short_is_no_row(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("iteration,total\n1,0.5\n2,0.4\n3,0.")
    assert [row["iteration"] for row in read_log(path)] == ["1", "2"]
    assert read_log(tmp_path / "none.csv") == []


def test_randomness_is_a_function_of_seed_and_iteration():
    draws = {}
    for seed, iteration in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        generator = seed_iteration(seed, iteration, CPU)
        draws.setdefault((seed, iteration), []).append((torch.rand(1).item(), generator.initial_seed()))
    assert len(set(draws[0, 1])) == 1
    assert len({draw[0] for draw in draws.values()}) == 3


# What is learnt from.


def poisoned(store: Store, folder: Path, cases: list[str]) -> Store:
    """A copy of the store in which these cases' labels are nonsense."""
    shutil.copytree(store.folder, folder)
    index = json.loads((folder / "store.json").read_text())
    for case in index["cases"]:
        if case["id"] in cases:
            path = folder / "cases" / case["id"] / "label.npy"
            label = np.load(path)
            label[:] = np.random.default_rng(0).integers(2, size=label.shape)
            np.save(path, label)
            data = path.read_bytes()
            case["arrays"]["label"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "store.json").write_text(json.dumps(index))
    return open_store(folder)


@pytest.mark.parametrize("method", ["vnet", "mlrpl"])
def test_labels_of_unlabelled_cases_are_never_learnt_from(store, tmp_path, method):
    labelled, unlabelled = store.ids("train")[:2], store.ids("train")[2:]
    run = example(method)
    clean = train(run, store, tmp_path / "clean")
    same = train(run, poisoned(store, tmp_path / "poison", unlabelled), tmp_path / "same")
    assert_undisturbed(same, clean)
    other = train(run, poisoned(store, tmp_path / "strong-poison", labelled), tmp_path / "other")
    assert not equal(weights(other / "last.pt"), weights(clean / "last.pt"))


def test_a_batch_without_unlabelled_volumes_learns_from_the_labelled_alone(store, tmp_path, monkeypatch):
    loaded = []
    load = Store.load
    monkeypatch.setattr(Store, "load", lambda self, case: loaded.append(case) or load(self, case))
    run = example(batch=(2, 0), beta_max=0, iterations=4)
    method = make_method(run, store, CPU)
    batch = make_batches(run, store, method)(1)
    assert loaded == store.ids("train")[:2]
    assert batch.image.shape[0] == batch.label.shape[0] == 2
    rows = read_log(train(run, store, tmp_path / "run") / "log.csv")
    assert all(math.isfinite(float(row["total"])) for row in rows)
    assert first_loss(run, store)["supervised"] != first_loss(example(), store)["supervised"]  # other statistics


def test_methods_that_need_unlabelled_volumes_say_so(store):
    with pytest.raises(StudyError, match="uamt learns from unlabelled volumes, and batch has none"):
        make_method(example("uamt", batch=(2, 0)), store, CPU)
    assert make_method(example("vnet", batch=(2, 0)), store, CPU)


def first_loss(run: Run, store: Store) -> dict[str, torch.Tensor]:
    method = make_method(run, store, CPU)
    batch = make_batches(run, store, method)(1)
    generator = seed_iteration(run.seed, 1, CPU)
    return method.loss(batch, Step(1, run.settings.iterations, generator))


def test_the_control_starts_with_the_same_network_batch_and_supervised_loss(store):
    mlrpl, control = first_loss(example(), store), first_loss(example(beta_max=0), store)
    for term in ("supervised", "mutual", "dice", "pseudo_foreground"):
        assert torch.equal(mlrpl[term], control[term]), term
    assert control["beta"] == 0 < mlrpl["beta"]
    assert mlrpl["mutual"] > 0
    assert torch.equal(control["total"], 0.5 * control["supervised"])
    torch.testing.assert_close(mlrpl["total"], 0.5 * mlrpl["supervised"] + mlrpl["beta"] * mlrpl["mutual"])


def test_the_control_is_mlrpl_without_the_mutual_loss_and_nothing_else(store, tmp_path, monkeypatch):
    control = train(example(beta_max=0), store, tmp_path / "control")
    mlrpl = train(example(), store, tmp_path / "mlrpl")
    monkeypatch.setattr("mlrpl.methods.mlrpl.mutual_loss", lambda *_, **__: torch.zeros(()))
    without = train(example(), store, tmp_path / "without")
    assert equal(weights(without / "last.pt"), weights(control / "last.pt"))
    assert not equal(weights(mlrpl / "last.pt"), weights(control / "last.pt"))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.unused_settings])
def test_settings_that_a_method_says_it_does_not_read_change_nothing(store, tmp_path, method):
    other = {"beta_max": 0.7, "ramp_iterations": 151, "head_dropout": False}
    changed = {name: other[name] for name in METHODS[method].unused_settings}
    reference = train(example(method), store, tmp_path / "reference")
    assert_undisturbed(train(example(method, **changed), store, tmp_path / "changed"), reference)


def test_vnet_learns_from_labelled_volumes_alone(store, monkeypatch):
    read = []
    load_case = Store.load
    monkeypatch.setattr(Store, "load", lambda self, case: read.append(case) or load_case(self, case))
    run = example("vnet", labelled=1)
    batch = make_batches(run, store, make_method(run, store, CPU))(1)
    assert read == store.ids("train")[:1]
    assert len(batch.image) == len(batch.label) == 4  # as many volumes as a semi-supervised batch


def test_more_labelled_cases_than_exist_are_refused(store):
    ids = store.ids("train")
    assert split_training(example(labelled=3), store, True) == (ids[:3], ids[3:])
    assert split_training(example("vnet", labelled=4), store, False) == (ids, [])
    with pytest.raises(StudyError, match="run mlrpl-5-s0: 5 labelled cases asked, but tiny has 4 for training"):
        split_training(example(labelled=5), store, True)
    with pytest.raises(StudyError, match="all 4 training cases are labelled, so mlrpl has none to learn from"):
        split_training(example(labelled=4), store, True)


def test_cases_without_label_cannot_be_labelled_ones():
    cases = [{"id": f"c{n}", "split": "train", "has_label": n < 2} for n in range(5)]
    part = SimpleNamespace(ids=lambda _: [case["id"] for case in cases], index={"cases": cases}, name="own")
    assert split_training(example(labelled=2), part, True) == (["c0", "c1"], ["c2", "c3", "c4"])
    with pytest.raises(StudyError, match="3 labelled cases asked, but own has 2"):
        split_training(example(labelled=3), part, True)


# Both selections.


def test_published_weights_are_those_of_the_first_best_check(store, tmp_path, monkeypatch):
    scores = iter([0.2, 0.5, 0.5, 0.3])
    monkeypatch.setattr(training, "check_dice", lambda *_: next(scores))
    folder = train(example(iterations=16), store, tmp_path)
    assert load(folder / "published.pt", CPU)["iteration"] == 8  # strictly better: not 12
    assert load(folder / "last.pt", CPU)["iteration"] == 16
    assert [(int(r["iteration"]), float(r["dice"])) for r in read_log(folder / "checks.csv")] == [
        (4, 0.2), (8, 0.5), (12, 0.5), (16, 0.3),
    ]  # fmt: skip
    assert not equal(weights(folder / "published.pt"), weights(folder / "last.pt"))


def test_the_best_check_is_remembered_over_a_kill(store, tmp_path, monkeypatch, checkpoints_every):
    checkpoints_every(5)
    run = example(iterations=16)
    scores = {4: 0.2, 8: 0.5, 12: 0.4, 16: 0.1}
    trainer = None
    monkeypatch.setattr(training, "check_dice", lambda *_: scores[trainer.iteration])
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, k: step(self, k) if k < 12 else 1 / 0)
    trainer = Trainer(run, store, tmp_path, KEY, CPU)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    monkeypatch.setattr(Trainer, "step", step)
    trainer = Trainer(run, store, tmp_path, KEY, CPU)
    assert (trainer.iteration, trainer.best) == (10, 0.5)
    trainer.train()
    assert load(tmp_path / "published.pt", CPU)["iteration"] == 8


def test_a_run_too_short_for_a_check_is_checked_once_at_its_end(store, tmp_path):
    folder = train(example(iterations=3), store, tmp_path)
    assert [row["iteration"] for row in read_log(folder / "checks.csv")] == ["3"]
    assert equal(weights(folder / "published.pt"), weights(folder / "last.pt"))


def test_checks_are_on_the_validation_cases_where_there_are_some():
    splits = {"val": ["v"], "test": ["t"]}
    assert check_cases(SimpleNamespace(ids=splits.get)) == ["v"]
    assert check_cases(SimpleNamespace(ids={**splits, "val": []}.get)) == ["t"]


def test_a_check_leaves_no_trace_in_training(store, undisturbed, tmp_path):
    """Batch norm and dropout are in training mode again after it."""
    other = train(example(iterations=20, check_from=1, check_every=1), store, tmp_path)
    assert equal(weights(other / "last.pt"), weights(undisturbed / "last.pt"))
    assert log_without_seconds(other) == log_without_seconds(undisturbed)


def test_a_rehearsal_leaves_no_trace_in_training(store, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "METHODS", {})  # as if it were one's own
    other = train(example(iterations=20), store, tmp_path)
    assert equal(weights(other / "last.pt"), weights(undisturbed / "last.pt"))
    assert log_without_seconds(other) == log_without_seconds(undisturbed)


# Trouble.


class Diverging(MLRPL):
    """MLRPL whose loss, or one of whose gradients or buffers, is not finite from some iteration on."""

    wrong_from, what = 8, "loss"

    def loss(self, batch, step):
        terms = super().loss(batch, step)
        if step.iteration >= self.wrong_from:
            if self.what == "loss":
                terms["total"] = terms["total"] * torch.nan
            elif self.what == "gradient":
                next(self.parameters()).register_hook(lambda gradient: gradient * torch.inf)
        return terms

    def after_step(self, step):
        if step.iteration >= self.wrong_from and self.what == "buffer":
            next(self.buffers()).fill_(torch.nan)  # a running mean, which training does not use


@pytest.mark.parametrize(("what", "said"), [
    ("loss", "the loss is nan"),
    ("gradient", "network.encoder.*.weight is not finite"),
    ("buffer", "network.encoder.*.running_mean is not finite"),
])  # fmt: skip
@pytest.mark.fault("a loss or weight that is not finite")
def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(
    store, tmp_path, monkeypatch, checkpoints_every, what, said
):
    monkeypatch.setitem(METHODS, "diverging", Diverging)
    monkeypatch.setattr(Diverging, "what", what)
    monkeypatch.setattr(Diverging, "wrong_from", 8 if what == "loss" else 10)  # 10: the last loss still is finite
    checkpoints_every(5)
    run = example("diverging", check_from=100)
    first = Diverging.wrong_from  # named is where it went wrong, not where that was noticed
    with pytest.raises(StudyError, match=rf"run diverging-2-s0: {said} at iteration {first}; .*is kept") as error:
        train(run, store, tmp_path / "run")
    assert "\n" not in str(error.value)
    folder = tmp_path / "run"
    assert not (folder / "last.pt").exists()
    state = load(folder / "checkpoint.pt", CPU)
    assert state["iteration"] == 5
    assert all(torch.isfinite(value).all() for value in state["method"].values())
    assert len(read_log(folder / "log.csv")) == 5
    # What made it diverge is mended: it goes on from there.
    monkeypatch.setattr(Diverging, "wrong_from", 1000)
    assert_undisturbed(train(run, store, folder), train(run, store, tmp_path / "reference"))


def test_a_nan_loss_is_seen_when_the_progress_is_looked_at(store, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "diverging", Diverging)
    monkeypatch.setattr(training, "PROGRESS_SECONDS", -1)
    with pytest.raises(StudyError, match="the loss is nan at iteration 8"):
        train(example("diverging"), store, tmp_path)


class Payload:
    """Unpickled without care it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(store, tmp_path):
    run, folder = example(), tmp_path / "run"
    folder.mkdir()
    torch.save({"key": KEY, "method": Payload(tmp_path / "made")}, folder / "checkpoint.pt")
    with pytest.raises(StudyError, match=r"checkpoint\.pt: cannot be read as weights .*; delete it and run again"):
        train(run, store, folder)
    assert not (tmp_path / "made").exists()
    with contextlib.suppress(Exception):
        torch.load(folder / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "made").exists()  # it would have


@pytest.mark.parametrize("lacking", ["method", "optimizer", "scaler", "iteration", "reason", "key"])
def test_a_checkpoint_that_lacks_something_is_refused_in_one_line(store, undisturbed, tmp_path, lacking):
    state = load(undisturbed / "checkpoint.pt", CPU)
    training.save(tmp_path / "checkpoint.pt", {name: value for name, value in state.items() if name != lacking})
    with pytest.raises(StudyError, match=r"^checkpoint\.pt of run mlrpl-2-s0.*; delete it and run again$"):
        train(example(iterations=20), store, tmp_path)


@pytest.mark.fault("a damaged checkpoint")
def test_a_damaged_checkpoint_is_named(store, undisturbed, tmp_path):
    data = (undisturbed / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(StudyError, match=r"checkpoint\.pt: cannot be read as weights"):
        train(example(iterations=20), store, tmp_path)
    with pytest.raises(StudyError, match=r"last\.pt: not there; train the run first"):
        load(tmp_path / "last.pt", CPU)


@pytest.mark.parametrize(("error", "said"), [
    (PermissionError(13, "Permission denied"), "Permission denied"),
    (OSError(116, "Stale file handle"), "Stale file handle"),
])  # fmt: skip
def test_weights_that_cannot_be_read_now_are_not_said_to_be_lost(
    store, undisturbed, tmp_path, monkeypatch, error, said
):
    def fail(*_, **__):
        raise error

    folder = shutil.copytree(undisturbed, tmp_path / "run")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(StudyError) as refusal:
        train(example(iterations=20), store, folder)
    assert str(refusal.value) == f"checkpoint.pt: cannot be read ({said})"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_memory_that_runs_out_while_weights_are_read_is_told_as_such(store, undisturbed, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    folder = shutil.copytree(undisturbed, tmp_path / "run")
    for broken in ((torch, "load"), (training, "restore")):
        with monkeypatch.context() as patch:
            patch.setattr(*broken, fail)
            with pytest.raises(type(error)):  # as `exhaustion_explained` expects it
                train(example(iterations=20), store, folder)


def test_a_record_that_cannot_be_read_does_not_pass_for_none(tmp_path):
    assert read_json(tmp_path / "provenance.json") == {}
    (tmp_path / "provenance.json").mkdir()
    with pytest.raises(StudyError, match=r"provenance\.json: cannot be read \(Is a directory\)"):
        read_json(tmp_path / "provenance.json")


def test_a_checkpoint_of_other_settings_is_refused_and_left_alone(store, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StudyError, match=r"checkpoint\.pt of run mlrpl-2-s0 belongs to other settings"):
        train(example(iterations=20, learning_rate=0.1), store, folder, key="fedcba9876543210")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["abacus", "cuda:999", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(StudyError, match=f"device '{name}' cannot be used: ") as error:
        find_device(name)
    assert "\n" not in str(error.value)


# The rest of the loop.


def test_learning_rate_schedules():
    rates = {kind: [learning_rate(kind, 0.01, k, 10_000) for k in (1, 2500, 2501, 10_000)]
             for kind in ("constant", "poly", "step")}  # fmt: skip
    assert rates["constant"] == [0.01] * 4
    assert rates["step"] == pytest.approx([0.01, 0.01, 0.001, 0.00001])
    assert rates["poly"] == pytest.approx([0.01, 0.01 * 0.7501**0.9, 0.01 * 0.75**0.9, 0.01 * 0.0001**0.9])
    assert learning_rate("poly", 0.01, 6000, 3000) == 0  # a step of later that is only timed


def test_the_rate_that_is_logged_is_the_rate_that_is_used(store, tmp_path, monkeypatch):
    used = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: used.append(self.param_groups[0]["lr"]) or step(self))
    folder = train(example(lr_schedule="poly", iterations=5), store, tmp_path)
    assert used == [learning_rate("poly", 0.01, k, 5) for k in range(1, 6)]
    assert [float(row["learning_rate"]) for row in read_log(folder / "log.csv")] == pytest.approx(used, rel=1e-6)


def test_what_a_method_does_not_have_stays_empty_in_the_log(store, tmp_path):
    rows = read_log(train(example("vnet", iterations=2), store, tmp_path) / "log.csv")
    assert all(row["mutual"] == row["beta"] == row["pseudo_foreground"] == "" for row in rows)
    assert all(float(row["supervised"]) == float(row["total"]) > 0 for row in rows)


def test_progress_and_facts(store, tmp_path):
    seen = []
    facts = Trainer(example(), store, tmp_path, KEY, CPU).train(seen.append)
    assert seen[-1].iteration == seen[-1].iterations == 12
    assert seen[-1].seconds_left == 0
    assert 0 <= seen[-1].dice <= 1
    assert json.loads((tmp_path / "progress.json").read_text())["iteration"] == 12
    assert facts["precision"] == "float32"
    assert facts["parameters"] == sum(p.numel() for p in make_method(example(), store, CPU).parameters())
    assert facts["seconds"] >= 0 < facts["peak_memory_mb"]
    assert facts["device"].startswith("CPU: ")
    assert {"commit", "python", "packages", "system"} <= facts.keys()


def test_tensorboard_holds_each_iteration_once_and_only_on_request(store, undisturbed, tmp_path, checkpoints_every):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not (undisturbed / "tensorboard").exists()
    checkpoints_every(2)
    first = Trainer(example(iterations=6), store, tmp_path, KEY, CPU, tensorboard=True)
    step = first.step
    first.step = lambda k: step(k) if k < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        first.train()
    Trainer(example(iterations=6), store, tmp_path, KEY, CPU, tensorboard=True).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("log/total")]
    rows = read_log(tmp_path / "log.csv")
    assert [k for k, _ in logged] == [int(row["iteration"]) for row in rows] == list(range(1, 7))
    assert [value for _, value in logged] == pytest.approx([float(row["total"]) for row in rows], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vnet", "mlrpl"])
def test_one_case_can_be_learnt_by_heart(store, tmp_path, method):
    run = example(
        method, labelled=1, augmentation=(), filters=4, learning_rate=0.05, iterations=300, beta_max=0.1,
        ramp_iterations=6000, check_from=1000,
    )  # fmt: skip
    trainer = Trainer(run, store, tmp_path, KEY, CPU)
    case = [store.load(store.ids("train")[0])]
    before = training.check_dice(trainer.method, case, CPU, trainer.precision)
    trainer.train()
    assert training.check_dice(trainer.method, case, CPU, trainer.precision) > 0.85 > before
