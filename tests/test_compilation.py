"""What a long run on a GPU compiles: the same terms, gradients and predictions, and nothing left out.

The compiler's front end alone is at work here, which decides what is compiled; its back end needs a GPU.
"""

import logging
from collections.abc import Iterator

import pytest
import torch
from test_methods import make, make_batch, sgd, train_step
from torch import nn

from mlrpl.bench.works import make_case
from mlrpl.compilation import COMPILED_FROM, compilation_pays, lacking, not_compiled
from mlrpl.data import Batch
from mlrpl.evaluation import predict_case
from mlrpl.methods import METHODS, Method
from mlrpl.precision import Precision

CPU = torch.device("cpu")
# torch asks whether a map has a gradient, and hides this warning unless warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
SLOW = [pytest.param(name, marks=() if name == "mlrpl" else pytest.mark.slow) for name in METHODS]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    before = torch._dynamo.config.suppress_errors
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logging.disable()  # the compiler's traces, which pytest would keep, take longer than compiling
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.config.suppress_errors = before


def without_dropout(name: str) -> Method:
    """Compiled dropout draws other numbers."""
    method = make(name, stride=(8, 8, 8))
    for module in method.modules():
        if isinstance(module, nn.Dropout3d):
            module.p = 0.0
    return method


@pytest.mark.parametrize("name", SLOW)
def test_compiled_a_method_trains_and_predicts_as_it_did(name: str) -> None:
    batch, case = make_batch(), make_case((48, 20, 16))
    if not METHODS[name].uses_unlabelled:
        batch = Batch(batch.image[:2], batch.label)
    plain, compiled = without_dropout(name), without_dropout(name)
    compiled.compile_parts(backend="aot_eager")
    torch._dynamo.config.suppress_errors = False  # what cannot be compiled is a failure here
    optimizers = sgd(plain), sgd(compiled)
    for iteration in (1, 2, 3):
        if iteration == 3:  # between steps, as checks are; six windows, four at a time
            maps = [predict_case(m, case, m.outputs, CPU, Precision("float32")) for m in (plain, compiled)]
            assert torch.allclose(*maps, atol=1e-4)
        terms = [train_step(m, o, batch, iteration) for m, o in zip((plain, compiled), optimizers, strict=True)]
        assert terms[0].keys() == terms[1].keys()
        for key, value in terms[0].items():
            assert torch.allclose(value, terms[1][key], rtol=1e-3, atol=1e-5), (iteration, key)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]


def test_short_runs_and_cpus_do_not_compile() -> None:
    assert compilation_pays(torch.device("cuda:1"), COMPILED_FROM)
    assert not compilation_pays(torch.device("cuda"), COMPILED_FROM - 1)
    assert not compilation_pays(CPU, 10 * COMPILED_FROM)


def test_what_a_machine_lacks_for_compiling_is_said_before_a_run_takes_longer(monkeypatch, tmp_path) -> None:
    gpu = torch.device("cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", {"clang": "/usr/bin/clang"}.get)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert lacking() == not_compiled(gpu, [COMPILED_FROM]) == ""
    (tmp_path / "Python.h").unlink()
    assert "headers are missing" in not_compiled(gpu, [10, COMPILED_FROM])
    monkeypatch.setattr("shutil.which", {}.get)
    assert "half as long again: a C compiler is missing" in not_compiled(gpu, [10, COMPILED_FROM])
    assert not_compiled(gpu, [10]) == not_compiled(CPU, [COMPILED_FROM]) == ""
