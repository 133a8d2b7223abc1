"""The audit counts what is there, changes nothing, and its hidden labels stay hidden."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import mannwhitneyu

from mlrpl import audit_report, training
from mlrpl.audit import (
    COLUMNS,
    DISTANCE_NAMES,
    MEASURES,
    OUTSIDE,
    RULES,
    auroc,
    boundary_distance,
    count_pairs,
    rows,
)
from mlrpl.config import Dataset, Run, Settings, load_study
from mlrpl.data import Batches, Case, Store, prepare
from mlrpl.errors import StudyError
from mlrpl.methods import METHODS
from mlrpl.methods.mlrpl import MLRPL
from mlrpl.reliability import select, weigh
from mlrpl.results import Results
from mlrpl.study import Workplace
from mlrpl.training import Trainer, hidden_labels, load, make_batches, make_method

CPU = torch.device("cpu")
CLASSES = ("background", "front", "back")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    dataset = Dataset(name="tiny", source="phantom", options={"train": 4, "test": 1, "size": [24, 24, 16]})
    return prepare(dataset, None, tmp_path_factory.mktemp("stores") / "tiny")


def example(audit_every: int = 2, iterations: int = 6) -> Run:
    settings = Settings(
        patch=(16, 16, 16), stride=(8, 8, 16), filters=2, iterations=iterations, ramp_iterations=150, check_from=3,
        check_every=3, precision="float32",
    )  # fmt: skip
    return Run(
        study="tiny", variant="mlrpl", method="mlrpl", title="MLRPL", labelled=2, seed=0, settings=settings,
        audit_every=audit_every,
    )  # fmt: skip


def train(run: Run, store: Store, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Trainer(run, store, folder, "0" * 16, CPU).train()
    return folder


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load(folder / "last.pt", CPU)["method"] for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What it counts


@pytest.fixture(scope="module", params=["features of all directions", "features much alike, as after a ReLU"])
def batch(request):
    """Two decoders' probabilities and features of two volumes with three classes, and the truth; a side is padding."""
    random = np.random.default_rng(0)
    truth = np.zeros((2, 8, 8, 6), np.uint8)
    truth[:, 2:6, 2:6, 1:4] = 1
    truth[:, 4:7, 4:8, 2:5] = 2
    truth[:, 6:] = OUTSIDE
    tensors = [
        (torch.tensor(truth)[:, None] == torch.arange(3)[:, None, None, None]) * 1.5 + torch.tensor(noise)
        for noise in random.normal(0, 1, (2, 2, 3, 8, 8, 6))
    ]
    features = [torch.tensor(random.normal(0, 1, (2, 4, 8, 8, 6))).float() for _ in range(2)]
    if "alike" in request.param:
        features = [1 + f.abs() / 4 for f in features]
    return [z.float().softmax(1) for z in tensors], features, truth


@pytest.fixture(scope="module")
def table(batch) -> pd.DataFrame:
    distances = np.stack([boundary_distance(label) for label in batch[2]])
    return pd.DataFrame(rows(*count_pairs(*batch, distances), CLASSES))


def one(table: pd.DataFrame, **where: str) -> pd.Series:
    where = {"scope": "all", "class": "all", "distance": "all", **where}
    (row,) = [row for _, row in table.iterrows() if all(row[name] == value for name, value in where.items())]
    return row


def both(batch, value):
    """A function of (student, teacher) as one vector over the two ordered pairs, without the padding."""
    probabilities, features, truth = batch
    inside, pairs = torch.tensor(truth != OUTSIDE), []
    for i, j in ((1, 0), (0, 1)):
        labels = probabilities[j].argmax(1)
        pairs.append(value(probabilities[i], probabilities[j], features[j], labels, torch.tensor(truth))[inside])
    return torch.cat(pairs).numpy()


@pytest.mark.parametrize("scope", ["all", "disagree"])
@pytest.mark.parametrize("name", ["all", "front"])
def test_rules_are_counted_as_a_reader_would(batch, table, scope, name):
    right = both(batch, lambda s, t, f, y, truth: y == truth)
    inside = np.ones_like(right)
    if scope == "disagree":
        inside &= both(batch, lambda s, t, f, y, truth: s.argmax(1) != y)
    if name != "all":
        inside &= both(batch, lambda s, t, f, y, truth: y == CLASSES.index(name))
    chosen = {
        "wr": both(batch, lambda s, t, f, y, truth: select("wr", s, t)),
        "> 0.7": both(batch, lambda s, t, f, y, truth: select("threshold", s, t, 0.7)),
    }
    for rule, keep in chosen.items():
        for part, mask in (("kept", keep), ("dropped", ~keep)):
            row = one(table, scope=scope, score=rule, bin=part, **{"class": name})
            assert (row["voxels"], row["correct"]) == ((mask & inside).sum(), (mask & inside & right).sum())


@pytest.mark.parametrize("scope", ["all", "disagree"])
def test_the_matched_threshold_keeps_the_surest_and_as_many_as_wr(batch, table, scope):
    right = both(batch, lambda s, t, f, y, truth: y == truth)
    sure = both(batch, lambda s, t, f, y, truth: t.amax(1))
    inside = np.ones_like(right) if scope == "all" else both(batch, lambda s, t, f, y, truth: s.argmax(1) != y)
    wanted = one(table, scope=scope, score="wr", bin="kept")["voxels"]
    row = one(table, scope=scope, score="matched", bin="kept")
    assert row["voxels"] == pytest.approx(wanted)
    best = right[inside][np.argsort(-sure[inside], kind="stable")[: int(wanted)]]
    assert row["correct"] == pytest.approx(best.sum(), abs=2)  # within the resolution of the levels


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scope", ["all", "disagree", "kept"])
def test_auroc_and_mean_weight_are_those_of_the_weights(batch, table, measure, scope):
    right = both(batch, lambda s, t, f, y, truth: y == truth)
    weight = both(batch, lambda s, t, f, y, truth: weigh(measure, t, f, y))
    inside = {
        "all": np.ones_like(right),
        "disagree": both(batch, lambda s, t, f, y, truth: s.argmax(1) != y),
        "kept": both(batch, lambda s, t, f, y, truth: select("wr", s, t)),
    }[scope]
    right, weight = right[inside], weight[inside]
    row = one(table, scope=scope, score=measure, bin="all")
    exact = mannwhitneyu(weight[right], weight[~right]).statistic / (right.sum() * (~right).sum())
    assert row["auroc"] == pytest.approx(exact, abs=0.005)
    assert row["weight"] == pytest.approx(weight.mean(), abs=0.02)
    groups = table[
        (table["score"] == measure) & (table["scope"] == scope) & (table["class"] == "all") & (table["bin"] != "all")
        & (table["distance"] == "all")
    ]  # fmt: skip
    assert groups["correct"].sum() == pytest.approx(right.sum())
    assert groups["weight"].is_monotonic_increasing
    assert np.allclose(groups["voxels"], len(right) / 10)


def test_groups_add_up(table):
    """Classes and distances each split all voxels; nothing is counted twice or lost."""
    for rule in RULES:
        mine = table[(table["score"] == rule) & (table["scope"] == "all") & (table["bin"] == "kept")]
        (whole,) = mine[(mine["class"] == "all") & (mine["distance"] == "all")]["voxels"]
        assert mine[mine["class"] != "all"]["voxels"].sum() == pytest.approx(whole)
        assert mine[mine["distance"] != "all"]["voxels"].sum() == pytest.approx(whole)
    assert set(table.columns) == set(COLUMNS) - {"iteration"}


def test_auroc_of_what_is_known():
    assert auroc(np.array([3, 0]), np.array([0, 2])) == 1
    assert auroc(np.array([0, 2]), np.array([3, 0])) == 0
    assert auroc(np.array([5, 5]), np.array([7, 7])) == 0.5
    assert np.isnan(auroc(np.array([0, 0]), np.array([1, 1])))


def test_distance_is_to_the_nearest_voxel_of_another_class():
    label = np.zeros((8, 1, 1), np.uint8)
    label[3:] = 1
    label[5:] = 2
    assert boundary_distance(label).ravel().tolist() == [3, 2, 1, 1, 1, 1, 2, 3]
    assert np.isinf(boundary_distance(np.zeros((2, 2, 2)))).all()
    label[:1], label[7:] = OUTSIDE, OUTSIDE
    assert boundary_distance(label).ravel().tolist() == [np.inf, 2, 1, 1, 1, 1, 2, np.inf]
    label[label == 1], label[label == 2] = 0, 0
    assert np.isinf(boundary_distance(label)).all()
    assert len(DISTANCE_NAMES) == 5


def test_labels_are_cropped_as_the_images_are():
    """With the image itself as the hidden label, the crops are the batch's."""
    random = np.random.default_rng(1)
    cases = [
        Case(name, "train", random.normal(size=(1, *size)).astype(np.float32), None, (1, 1, 1))
        for name, size in (("a", (20, 24, 18)), ("b", (12, 30, 16)), ("c", (24, 20, 20)))
    ]
    batches = Batches([], cases, (16, 16, 16), ("rot90", "flip"), 3, (0, 2))
    known = {case.id: case.image[0] for case in cases if case.id != "b"}
    for iteration in (1, 2, 7):
        crops = batches.unlabelled_crops(iteration, known, 0)
        for image, crop, position in zip(
            batches(iteration).image, crops, batches._positions(1, iteration), strict=True
        ):
            if batches._case(1, position).id == "b":
                assert crop is None
            else:
                assert np.array_equal(crop, image[0].numpy())


# What it must not do


@pytest.fixture(scope="module")
def audited(store, tmp_path_factory) -> Path:
    return train(example(), store, tmp_path_factory.mktemp("audited"))


def test_training_is_the_same_with_and_without(store, audited, tmp_path):
    plain = train(example(audit_every=0), store, tmp_path / "plain")
    assert same_weights(audited, plain)
    strip = [pd.read_csv(f / "log.csv").drop(columns="seconds") for f in (audited, plain)]
    pd.testing.assert_frame_equal(*strip)
    assert not (plain / "audit.csv").exists()
    found = pd.read_csv(audited / "audit.csv")
    assert list(found.columns) == list(COLUMNS)
    assert found["iteration"].unique().tolist() == [2, 4, 6]
    assert set(found["score"]) == {*RULES, *MEASURES}


def test_hidden_labels_reach_the_audit_and_nothing_else(store, audited, tmp_path, monkeypatch):
    """Poisoned, they change every count and not one bit of the weights."""

    def poisoned(run, store):
        return {name: np.full_like(label, 1) for name, label in hidden_labels(run, store).items()}

    monkeypatch.setattr(training, "hidden_labels", poisoned)
    folder = train(example(), store, tmp_path / "poisoned")
    assert same_weights(audited, folder)
    first, second = (pd.read_csv(f / "audit.csv") for f in (audited, folder))
    wr = [f[(f["score"] == "wr") & (f["class"] == "all") & (f["distance"] == "all")] for f in (first, second)]
    assert (wr[0]["voxels"].to_numpy() == wr[1]["voxels"].to_numpy()).all()
    assert (wr[0]["correct"].to_numpy() != wr[1]["correct"].to_numpy()).all()


def test_what_is_trained_on_has_no_hidden_label(store):
    batches = make_batches(example(), store, make_method(example(), store, CPU))
    assert [case.label is None for case in batches.streams[1]] == [True, True]
    assert set(hidden_labels(example(), store)) == {case.id for case in batches.streams[1]}


def test_killed_and_resumed_the_audit_has_each_row_once(store, audited, tmp_path, monkeypatch):
    step = Trainer.step

    def stepped(self, iteration):
        monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1 if iteration == 3 else float("inf"))
        if iteration == 6 and self.began_with.pop("first", True):
            raise KeyboardInterrupt
        return step(self, iteration)

    monkeypatch.setattr(Trainer, "step", stepped)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train(example(), store, folder)
    found = pd.read_csv(folder / "audit.csv")
    assert found["iteration"].unique().tolist() == [2]
    with (folder / "audit.csv").open("a") as file:
        file.write("4,all,all,all,wr,kept,1,1,,\n6,all,al")  # after the checkpoint: to be cut
    monkeypatch.setattr(Trainer, "step", step)
    train(example(), store, folder)
    assert (folder / "audit.csv").read_bytes() == (audited / "audit.csv").read_bytes()


class LabelledFirst(MLRPL):
    def loss(self, batch, step):
        self.network(batch.image[: len(batch.label)])
        return super().loss(batch, step)


class PartByPart(MLRPL):
    def loss(self, batch, step):
        skips = self.network.encoder(batch.image)
        return {"total": sum(decoder(skips)[0].float().mean() for decoder in self.network.decoders)}


@pytest.mark.parametrize(("method", "said"), [
    (LabelledFirst, "first pass of a step, which is of 2 of a batch's 4 volumes: begin the loss with"),
    (PartByPart, "first pass of a step, which is missing"),
])  # fmt: skip
def test_a_pass_that_is_not_the_whole_batch_is_not_taken_for_it(store, tmp_path, monkeypatch, method, said):
    """Its volumes would be measured with the hidden labels of others."""
    monkeypatch.setitem(METHODS, "mlrpl", method)
    with pytest.raises(StudyError, match=said):
        train(example(), store, tmp_path / "run")


def test_the_key_does_not_know_of_the_audit():
    keys = {example(audit_every=every).key("data", 1, {}) for every in (0, 5)}
    assert len(keys) == 1


# What is told of it


def test_each_variant_and_number_of_labelled_cases_is_told_of_by_itself(audited, tmp_path):
    runs = pd.DataFrame(
        [("mlrpl", 2, 0, "MLRPL"), ("mlrpl", 3, 0, "MLRPL"), ("other", 2, 0, "Other"), ("mlrpl", 2, 1, "MLRPL")],
        columns=["variant", "labelled", "seed", "title"],
    ).assign(study="tiny", method="mlrpl", iterations=6, seconds=10.0, seconds_audit=[0.1, 0.2, 0.3, 0.4])
    runs["run"] = runs["variant"] + "-" + runs["labelled"].astype(str) + "-s" + runs["seed"].astype(str)
    rows = pd.read_csv(audited / "audit.csv")
    found = Results(
        pd.DataFrame(), runs, pd.DataFrame(), pd.DataFrame(), pd.concat([rows.assign(run=r) for r in runs["run"]])
    )
    subjects = audit_report.subjects(found)
    assert {ending: list(of.runs["run"]) for ending, of in subjects.items()} == {
        "": ["mlrpl-2-s0", "mlrpl-2-s1"], "-mlrpl-3": ["mlrpl-3-s0"], "-other-2": ["other-2-s0"],
    }  # fmt: skip
    told = [audit_report.described(of) for of in subjects.values()]
    assert told == [
        "MLRPL, 2 labelled, s0, s1",
        "MLRPL, 3 labelled, s0",
        "Other, 2 labelled, s0",
    ]
    costs = audit_report.together(audit_report.cost_table, subjects)
    names = ["MLRPL, 2 labelled", "MLRPL, 2 labelled", "MLRPL, 3 labelled", "Other, 2 labelled"]
    assert list(costs["Audited"]) == names
    assert list(costs["Share (%)"]) == ["1.00", "4.00", "2.00", "3.00"]
    alone = {"": subjects[""]}
    assert "Audited" not in audit_report.together(audit_report.cost_table, alone)
    which = audit_report.together(audit_report.choice_table, subjects)
    assert (
        which.drop(columns="Audited")
        .iloc[: len(which) // 3]
        .equals(audit_report.together(audit_report.choice_table, alone))
    )
    headings = [heading for heading, _ in audit_report.drawn(audit_report.coverage_figure, subjects, tmp_path, "c")]
    assert headings == [f"**{name}**" for name in told]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"c.svg", "c-mlrpl-3.svg", "c-other-2.svg"}


def test_a_run_without_foreground_among_its_pseudo_labels_can_be_shown(audited):
    runs = pd.DataFrame([("r", "mlrpl", 2, 0, "MLRPL")], columns=["run", "variant", "labelled", "seed", "title"])
    runs = runs.assign(study="tiny", method="mlrpl", iterations=6, seconds=10.0, seconds_audit=0.1)
    rows = pd.read_csv(audited / "audit.csv").assign(run="r")
    background = rows[rows["class"].isin(["all", "background"])]
    assert len(background) < len(rows)
    found = Results(pd.DataFrame(), runs, pd.DataFrame(), pd.DataFrame(), background)
    assert "Which pseudo-labels" in audit_report.answers(found)
    for table in (audit_report.choice_table, audit_report.predictor_table):
        assert len(table(found))
    for figure in ("choice_figure", "coverage_figure", "predictor_figure", "reliability_diagram"):
        assert getattr(audit_report, figure)(found).axes


def test_without_an_audit_there_is_nothing_to_tell():
    with pytest.raises(StudyError, match="no run of this study was audited"):
        audit_report.subjects(Results())


# What it says when it is asked for the impossible

STUDY = """
name: s
title: S
dataset: {name: d, source: phantom, options: {train: 3, test: 1, size: [24, 24, 16]}}
settings: {patch: [16, 16, 16], stride: [8, 8, 16], filters: 2}
audit: {every: 10, variants: [WHICH]}
runs:
  - {variant: mlrpl, method: mlrpl, title: M, labelled: 1}
  - {variant: vnet, method: vnet, title: V, labelled: 1}
"""


def study(folder: Path, variant: str) -> str:
    (folder / "s.yaml").write_text(STUDY.replace("WHICH", variant), encoding="utf-8")
    return str(folder / "s.yaml")


def test_only_the_variants_named_are_audited(tmp_path):
    every = {run.variant: run.audit_every for run in load_study(study(tmp_path, "mlrpl")).runs()}
    assert every == {"mlrpl": 10, "vnet": 0}


def test_an_unknown_variant_is_named(tmp_path):
    with pytest.raises(StudyError, match="no line of runs has the variant 'mlrlp'"):
        load_study(study(tmp_path, "mlrlp"))


def test_a_single_decoder_cannot_be_audited(tmp_path):
    place = Workplace(study(tmp_path, "vnet"), str(tmp_path / "runs"), str(tmp_path / "results"))
    with pytest.raises(StudyError, match="vnet has one decoder"):
        _ = place.jobs


def test_without_hidden_labels_there_is_nothing_to_audit(store, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "hidden_labels", lambda run, store: {})
    with pytest.raises(StudyError, match="drop `audit`"):
        train(example(), store, tmp_path / "none")
