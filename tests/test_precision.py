"""Reduced precision is used only where its gradients are right, and the check leaves no trace."""

import copy
from pathlib import Path

import pytest
import torch

from mlrpl import precision
from mlrpl.networks import VNet, to_channels_last
from mlrpl.precision import TOLERANCE, Precision, choose_precision, computing, to_predict_in, worst_layer
from mlrpl.provenance import instructions

CPU = torch.device("cpu")
WRONG = (32, 16, 16)  # two voxels at the bottleneck's first side
RIGHT = (48, 32, 16)

needs_bf16 = pytest.mark.skipif(
    precision.fastest(CPU) != "bfloat16", reason="this CPU has no avx512_bf16: it trains in float32 anyway"
)


@pytest.fixture
def network() -> VNet:
    torch.manual_seed(0)
    return to_channels_last(VNet(1, 2, filters=2, upsamplings=("deconv", "nearest", "trilinear")))


@pytest.fixture
def wrong_bf16(monkeypatch):
    """Weight gradients of every convolution of this kind are wrong in reduced precision, whatever the hardware does."""
    layer = precision._layer

    def spoil(kind: type, factor: float) -> None:
        def spoiled(module, image, dtype):
            output, image_gradient, weight_gradient = layer(module, image, torch.float32)
            wrong = dtype != torch.float32 and isinstance(module, kind)
            return output, image_gradient, weight_gradient * (factor if wrong else 1)

        monkeypatch.setattr(precision, "_layer", spoiled)

    return spoil


@needs_bf16
def test_a_patch_that_breaks_bf16_gradients_trains_in_float32_and_says_so(network):
    chosen = choose_precision("auto", network, WRONG, 4, CPU)
    if chosen.name == "bfloat16":
        pytest.skip("this PyTorch's bf16 gradients are right at a first side of 32")
    assert chosen.name == "float32"
    assert not chosen.reduced
    assert "training in float32: with patch 32×16×16, bfloat16 gradients" in chosen.reason
    assert "Conv3d at 2×1×1" in chosen.reason
    assert "\n" not in chosen.reason


@needs_bf16
def test_a_patch_whose_bf16_gradients_are_right_trains_in_bf16(network):
    chosen = choose_precision("auto", network, RIGHT, 4, CPU)
    assert chosen == Precision("bfloat16")
    assert chosen.reduced
    assert chosen.dtype == torch.bfloat16
    assert worst_layer(network, RIGHT, 4, CPU, torch.bfloat16)[0] > 1e-4  # it is bf16 that was tried


def test_float32_is_not_questioned(network, monkeypatch):
    monkeypatch.setattr(precision, "worst_layer", lambda *_: pytest.fail("checked"))
    assert choose_precision("float32", network, RIGHT, 4, CPU) == Precision("float32")
    monkeypatch.setattr(precision, "fastest", lambda _: "float32")
    assert choose_precision("auto", network, RIGHT, 4, CPU) == Precision("float32")
    assert Precision("float32").dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.nn.Conv3d, torch.nn.ConvTranspose3d])
@pytest.mark.parametrize(("factor", "expected"), [(1.05, "off by 5.0%"), (float("nan"), "not finite")])
def test_a_wrong_kernel_is_found_and_named(network, wrong_bf16, kind, factor, expected):
    wrong_bf16(kind, factor)
    chosen = choose_precision("bfloat16", network, WRONG, 2, CPU)
    assert chosen.name == "float32"
    assert expected in chosen.reason
    assert f"({kind.__name__} at " in chosen.reason


def test_rounding_is_no_error(network, wrong_bf16):
    wrong_bf16(torch.nn.Conv3d, 1 + TOLERANCE / 3)
    assert choose_precision("bfloat16", network, WRONG, 2, CPU) == Precision("bfloat16")
    assert worst_layer(network, WRONG, 2, CPU, torch.bfloat16)[0] == pytest.approx(TOLERANCE / 3, rel=1e-3)


def test_a_wrong_output_or_input_gradient_is_found_too(network, monkeypatch):
    layer = precision._layer
    for spoiled in range(3):

        def one_wrong(module, image, dtype, spoiled=spoiled):
            tensors = layer(module, image, torch.float32)
            return tuple(t * 1.5 if n == spoiled and dtype != torch.float32 else t for n, t in enumerate(tensors))

        monkeypatch.setattr(precision, "_layer", one_wrong)
        assert worst_layer(network, WRONG, 2, CPU, torch.bfloat16)[0] == pytest.approx(0.5)


def test_every_size_and_kind_of_convolution_is_tried(network, monkeypatch):
    tried = []
    layer = precision._layer

    def note(module, image, dtype):
        tried.append((str(module), tuple(image.shape)))
        return layer(module, image, torch.float32)

    monkeypatch.setattr(precision, "_layer", note)
    worst_layer(network, WRONG, 3, CPU, torch.bfloat16)
    kinds = {str(m) for m in network.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d)}
    assert {kind for kind, _ in tried} == kinds
    assert {shape[0] for _, shape in tried} == {3}  # the volumes of a batch
    assert {shape[2:] for _, shape in tried} == {(32, 16, 16), (16, 8, 8), (8, 4, 4), (4, 2, 2), (2, 1, 1)}


def test_the_check_changes_neither_network_nor_random_state(network):
    network.train()
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    chosen = choose_precision("bfloat16", network, WRONG, 2, CPU)
    assert chosen.name in ("bfloat16", "float32")
    assert torch.equal(torch.get_rng_state(), random)
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in network.parameters())
    assert network.training
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_the_answer_is_always_the_same(network):
    torch.manual_seed(1)
    first = choose_precision("bfloat16", network, WRONG, 2, CPU)
    torch.manual_seed(2)
    second = choose_precision("bfloat16", network, WRONG, 2, CPU)
    assert first.name == second.name


def test_a_torch_that_does_not_tell_the_cpus_instructions_leaves_it_to_the_system(monkeypatch):
    told = instructions()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    instructions.cache_clear()
    try:
        if Path("/proc/cpuinfo").exists():
            assert instructions() == told
        monkeypatch.setattr("mlrpl.provenance._cpu_flags", lambda: {"avx2", "avx512_bf16", "fma"})
        instructions.cache_clear()
        assert instructions() == {"avx2", "avx512_bf16"}
        assert precision.fastest(CPU) == "bfloat16"
    finally:
        instructions.cache_clear()


@pytest.mark.parametrize(("error", "reason"), [
    (RuntimeError("Unable to find an engine\nmore"), "training in float32: in bfloat16 Unable to find an engine"),
    (torch.OutOfMemoryError("CUDA out of memory"), None),
])  # fmt: skip
def test_convolutions_that_do_not_run_are_not_used(network, monkeypatch, error, reason):
    def refused(*_):
        raise error

    monkeypatch.setattr(precision, "_layer", refused)
    if reason is None:
        with pytest.raises(torch.OutOfMemoryError):
            choose_precision("bfloat16", network, RIGHT, 2, CPU)
    else:
        assert choose_precision("bfloat16", network, RIGHT, 2, CPU) == Precision("float32", reason)


def test_predictions_are_computed_as_the_run_was_trained():
    """What was trained in float32 is not predicted in TF32, which is PyTorch's default for a GPU's convolutions."""
    product = torch.ones(2, 2)
    before = torch.backends.cudnn.allow_tf32
    with computing(CPU, Precision("float32")):
        assert not torch.backends.cudnn.allow_tf32
        assert (product @ product).dtype == torch.float32
    with computing(CPU, Precision("bfloat16")):
        assert torch.backends.cudnn.allow_tf32 == before
        assert (product @ product).dtype == torch.bfloat16
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    ("trained_in", "fast", "expected"),
    [("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"), ("float32", "bfloat16", "float32"),
     ("float16", "bfloat16", "float32")],
)  # fmt: skip
def test_a_cpu_predicts_in_reduced_precision_only_where_it_has_instructions_for_it(
    monkeypatch, trained_in, fast, expected
):
    """Weights come from a GPU's bf16, too."""
    monkeypatch.setattr(precision, "fastest", lambda _: fast)
    assert to_predict_in(trained_in, CPU) == Precision(expected)
    assert to_predict_in(trained_in, torch.device("cuda")) == Precision(trained_in)
