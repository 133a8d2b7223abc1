"""Evaluation: the rows that are written, and BatchNorm by a volume's own statistics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mlrpl.config import Settings
from mlrpl.data import Case
from mlrpl.evaluation import PREDICTIONS, evaluate, own_statistics, predict_case
from mlrpl.methods import METHODS, Method
from mlrpl.precision import Precision
from mlrpl.rows import LARGEST

CPU, FLOAT32 = torch.device("cpu"), Precision("float32")
SETTINGS = Settings(patch=(32, 16, 16), stride=(16, 16, 16), filters=2)


@pytest.fixture
def method():
    torch.manual_seed(0)
    return METHODS["mlrpl"](SETTINGS, 1, 2)


def case(scale=1.0):
    image = np.random.default_rng(0).normal(size=(1, 32, 16, 16)).astype(np.float32) * scale
    return Case("a", "test", image, np.zeros((32, 16, 16), np.uint8), (1.0, 1.0, 1.0))


def predicted(method, scale=1.0):
    return predict_case(method, case(scale), ("decoder1",), CPU, FLOAT32)[0]


def test_own_statistics_are_those_of_the_volume_whatever_the_running_ones(method):
    with own_statistics(method):
        first = predicted(method)
    for module in method.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean += 3
            module.running_var *= 9
    with own_statistics(method):
        torch.testing.assert_close(predicted(method), first, rtol=0, atol=0)
        # The first convolution's scale is normalised away, all but its bias and BatchNorm's ε.
        method.network.encoder.stages[0][0].bias.data.zero_()
        torch.testing.assert_close(predicted(method, 1000), predicted(method, 100), rtol=0, atol=0.01)
    assert not torch.allclose(predicted(method), first)


def test_own_statistics_leave_the_running_ones_as_they_were(method):
    before, outside = {name: value.clone() for name, value in method.state_dict().items()}, predicted(method)
    with pytest.raises(ValueError, match="divisible"), own_statistics(method):
        method.network(torch.zeros(1, 1, 8, 8, 8))
    after = method.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(predicted(method), outside, rtol=0, atol=0)
    assert method.training


class Bright(Method):
    """A "network" that calls what is bright class 1."""

    outputs = ("decoder1",)

    def predict(self, image, outputs):
        return [torch.cat([0.5 - image, image - 0.5], dim=1).softmax(1)] * len(outputs)


def test_rows_of_the_largest_component_leave_islands_out_and_the_label_maps_do_not(tmp_path):
    label = np.zeros((32, 16, 16), np.uint8)
    label[2:12, 2:12, 2:12] = 1
    image = label[None].astype(np.float32)
    image[0, 29:31, 12:14, 12:14] = 1  # an island
    one = Case("a", "test", image, label, (1.0, 1.0, 1.0))
    store = SimpleNamespace(ids=lambda _: ["a"], load=lambda _: one, classes=["background", "cube"])
    settings = SimpleNamespace(threads=1)
    run = SimpleNamespace(study="s", method="m", variant="", labelled=1, seed=0, fold=None, settings=settings)
    weights = {selection: {"method": {}, "precision": "float32"} for selection in ("last", "published")}
    rows = evaluate(run, store, Bright(SETTINGS, 1, 2), weights, tmp_path, "voxels", CPU)
    assert set(zip(rows["selection"], rows["output"], strict=True)) == {
        (selection, output) for selection in weights for output in ("decoder1", LARGEST)
    }
    measured = rows[rows["selection"] == "published"].set_index("output")
    assert measured.loc[LARGEST, "dice"] == 1
    assert measured.loc[LARGEST, "hd95"] == measured.loc[LARGEST, "asd"] == 0
    assert measured.loc["decoder1", "dice"] == pytest.approx(2 * 1000 / 2008)
    assert measured.loc["decoder1", "asd"] > 0
    assert np.load(tmp_path / PREDICTIONS)["a"].sum() == 1008
