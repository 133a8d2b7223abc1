"""Evaluation: the rows that are written, and BatchNorm by a volume's own statistics."""

import numpy as np
import pytest
import torch
from torch import nn

from mlrpl.config import Settings
from mlrpl.data import Case
from mlrpl.evaluation import own_statistics, predict_case
from mlrpl.methods import METHODS
from mlrpl.precision import Precision

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
