"""Which precision a run trains in: chosen by the hardware, and only after its convolutions have proved right.

Reduced precision is checked, not trusted: some CPU and GPU kernels for bf16 conv3d return wrong gradients at some sizes
(torch 2.13.0, avx512_bf16: the weight gradient of a 3³ convolution whenever the first spatial size is 2; see also
PyTorch issues 163539 and 188426). So every convolution of the network is run once at the study's patch size, forward
and backward, in float32 and in the chosen precision.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlrpl.memory import is_exhaustion
from mlrpl.provenance import instructions

TOLERANCE = 0.02  # relative error of a single layer; correct bf16 kernels stay below 0.006


@dataclass(frozen=True)
class Precision:
    """The chosen precision and, where it is not the hardware's fastest, one line that says why."""

    name: str
    reason: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """torch.float32, torch.bfloat16 or torch.float16."""
        return getattr(torch, self.name)

    @property
    def reduced(self) -> bool:
        """Whether autocast is on."""
        return self.name != "float32"

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """What scales the loss, so that its gradients are not lost in float16; it does nothing in other precisions."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "float16")


@contextmanager
def exact() -> Iterator[None]:
    """float32 that is float32: no TF32 on a GPU within."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def computing(device: torch.device, precision: Precision) -> Iterator[None]:
    """Within, a network computes in that precision: under autocast where it is reduced, else in true float32."""
    with (
        nullcontext() if precision.reduced else exact(),
        torch.autocast(device.type, dtype=precision.dtype, enabled=precision.reduced),
    ):
        yield


@contextmanager
def as_it_comes() -> Iterator[None]:
    """What is done once within is not worth cuDNN's search for the fastest way, which takes seconds a layer."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fastest(device: torch.device) -> str:
    """Name of the precision that this hardware has instructions for."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # is asked of the current one
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and "avx512_bf16" in instructions():
        return "bfloat16"
    return "float32"


def to_predict_in(trained_in: str, device: torch.device) -> Precision:
    """The precision to predict in: that of the training, but float32 on a CPU that has no instructions for it.

    Weights from a GPU's bf16 are as good in float32; such a CPU would take ten times as long for bf16.
    """
    if device.type == "cpu" and trained_in != fastest(device):
        return Precision("float32")
    return Precision(trained_in)


def choose_precision(
    requested: str,
    network: nn.Module,
    patch: Sequence[int],
    volumes: int,
    device: torch.device,
    channels: int = 1,
) -> Precision:
    """The precision to train in.

    Args:
        requested: "auto" (the hardware's fastest) or a precision's name.
        network: the network as it will be trained; it is not changed.
        patch: (x, y, z) voxels.
        volumes: of a batch.
        device: where it will be trained.
        channels: of the image.

    Returns:
        float32 with a reason where the reduced precision's gradients are wrong, or a convolution does not run in it.
    """
    name = fastest(device) if requested == "auto" else requested
    if name == "float32":
        return Precision(name)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            worst, where = worst_layer(network, patch, volumes, device, getattr(torch, name), channels)
        except RuntimeError as error:
            if is_exhaustion(error):
                raise
            return Precision("float32", f"training in float32: in {name} {str(error).splitlines()[0]}")
    if worst <= TOLERANCE:
        return Precision(name)
    error = f"off by {worst:.1%}" if worst < float("inf") else "not finite"
    size = "×".join(map(str, patch))
    return Precision(
        "float32",
        f"training in float32: with patch {size}, {name} gradients of a convolution ({where}) are {error} here",
    )


def worst_layer(
    network: nn.Module,
    patch: Sequence[int],
    volumes: int,
    device: torch.device,
    dtype: torch.dtype,
    channels: int = 1,
) -> tuple[float, str]:
    """Largest relative error (L2, over output, input gradient and weight gradient) of any convolution, and its name.

    Layers of one kind and size are checked once.
    """
    shapes: dict[str, torch.Size] = {}
    probe = copy.deepcopy(network).eval().requires_grad_()
    convolutions = {n: m for n, m in probe.named_modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: shapes.__setitem__(name, inputs[0].shape))
        for name, module in convolutions.items()
    ]
    with torch.inference_mode(), as_it_comes():
        probe(torch.zeros(1, channels, *patch, device=device))
    for hook in hooks:
        hook.remove()
    worst, where = 0.0, ""
    seen = set()
    for name, module in convolutions.items():
        if name not in shapes:  # a network of one's own may have layers for training alone
            continue
        shape = (volumes, *shapes[name][1:])
        if (kind := (str(module), shape)) in seen:
            continue
        seen.add(kind)
        image = torch.randn(shape, device=device).to(memory_format=torch.channels_last_3d)
        with exact(), as_it_comes():
            expected = _layer(module, image, torch.float32)
        for ours, reference in zip(_layer(module, image, dtype), expected, strict=True):
            error = ((ours - reference).norm() / reference.norm()).item()
            error = error if error == error else float("inf")  # NaN
            if error > worst:
                worst, where = error, f"{type(module).__name__} at {'×'.join(map(str, shape[2:]))}"
    return worst, where


def _layer(module: nn.Module, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient of one layer, as float32."""
    image = image.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast(image.device.type, dtype=dtype, enabled=dtype != torch.float32):
        output = module(image)
    # A fixed gradient of mean 0, the same for both precisions.
    gradient = torch.linspace(-50, 50, output.numel(), device=image.device).sin().view(output.shape)
    output.backward(gradient.to(output.dtype))
    return output.detach().float(), image.grad.float(), module.weight.grad.float().clone()
