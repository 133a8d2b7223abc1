"""Which channels a step's dropout left is told right, also of draws made anew."""

import io

import pandas as pd
import pytest
import torch
from test_training import example, train

from mlrpl import channels
from mlrpl.channels import beside_log, drawn, redrawn
from mlrpl.cli import main
from mlrpl.config import Dataset
from mlrpl.data import Store, prepare
from mlrpl.methods import Step
from mlrpl.precision import Precision
from mlrpl.reliability import mutual_loss
from mlrpl.study import Workplace
from mlrpl.training import make_batches, make_method, read_log, seed_iteration

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    dataset = Dataset(name="tiny", source="phantom", options={"train": 4, "test": 1, "size": [24, 24, 16]})
    return prepare(dataset, None, tmp_path_factory.mktemp("stores") / "tiny")


@pytest.mark.parametrize(("name", "decoders"), [("mlrpl", 2), ("vnet", 1)])
def test_the_draws_are_those_of_the_step(store, name, decoders):
    run = example(name, filters=8, seed=3)
    method = make_method(run, store, CPU).train()
    batches, seen = make_batches(run, store, method), []
    for decoder in method.network.decoders:
        decoder.dropout.register_forward_hook(lambda _, inputs, kept: seen.append(kept.ne(0).any(4).any(3).any(2)))
    for iteration in (1, 2, 7):
        generator = seed_iteration(run.seed, iteration, CPU)
        method.loss(batches(iteration), Step(iteration, 12, generator))
        found = torch.stack(seen).sum(2)
        assert torch.equal(drawn(run, iteration, decoders), found)
        assert found.shape == (decoders, 4) and 0 < found.float().mean() < 8
        seen.clear()


def test_a_log_beside_its_draws(store, tmp_path):
    run = example(iterations=40, filters=4)
    folder = train(run, store, tmp_path)
    rows = beside_log(run, folder / "log.csv", 2)
    log = [row for row in read_log(folder / "log.csv") if int(row["iteration"]) > 4]
    assert rows["n"].sum() == len(log) == 36
    for row in rows.to_dict("records"):
        same = [float(of["mutual"]) for of in log if int(drawn(run, int(of["iteration"]), 2).min()) == row["kept"]]
        assert len(same) == row["n"] and max(same) == pytest.approx(row["mutual_max"])


def test_draws_made_anew(store):
    run = example(filters=4)
    method = make_method(run, store, CPU)
    batches = make_batches(run, store, method)
    rows = redrawn(method, (batches(n) for n in (1, 2)), Precision("float32"), draws=30)
    assert len(rows) == 62 and rows.loc[rows["kept"] == 4, "draw"].tolist() == [0, 0]
    assert {0, 1} <= set(rows["kept"])
    rows = rows[rows["batch"] == 0]
    whole = rows["mutual"].iloc[0]
    torch.manual_seed(0)
    maps = method.network.encoder(batches(1).image)
    features = [decoder.levels(maps)[-1] for decoder in method.network.decoders]
    logits = [decoder.head(f) for decoder, f in zip(method.network.decoders, features, strict=True)]
    assert rows["kept"].iloc[0] == 4 and whole == pytest.approx(mutual_loss(logits, features).item(), rel=1e-5)
    assert rows["mutual"].nunique() > 20


def test_three_decoders_draw_three_times(store, tmp_path):
    run = example(iterations=20, filters=4, options={"upsamplings": ["deconv", "nearest", "trilinear"]})
    folder = train(run, store, tmp_path)
    rows = beside_log(run, folder / "log.csv", 3)
    fewest = [int(drawn(run, iteration, 3).min()) for iteration in range(3, 21)]
    assert dict(zip(rows["kept"], rows["n"], strict=True)) == {k: fewest.count(k) for k in sorted(set(fewest))}


def test_the_command(monkeypatch, capsys, tmp_path):
    def command(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["mlrpl", "channels", "smoke", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code == 0) == (err == "")
        return out or err

    monkeypatch.chdir(tmp_path)
    place = Workplace("smoke")
    place.prepare()
    assert "run mlrpl-2-s0: not trained here" in command("mlrpl-2-s0")
    place.train("mlrpl-2-s0", "cpu")
    rows = pd.read_csv(io.StringIO(command("mlrpl-2-s0")))
    assert rows["n"].sum() == 6 and set(rows["run"]) == {"mlrpl-2-s0"}
    assert "run vnet-2-s0: only a run of mlrpl" in command("vnet-2-s0")
    provenance = place.job("mlrpl-2-s0").folder / "provenance.json"
    provenance.write_text(provenance.read_text().replace('"device": "CPU', '"device": "Some GPU'))
    assert "trained on a GPU" in command("mlrpl-2-s0")
    rows = pd.read_csv(io.StringIO(command("mlrpl-2-s0", "--batches", "1")))
    assert len(rows) == 1 + channels.DRAWS and rows["kept"].iloc[0] == 4 and rows["mutual"].notna().all()
