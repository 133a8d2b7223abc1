"""What the machine can do, how near a step comes to it, and a timeline of one step."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mlrpl.devices import device_name, seconds, synchronise
from mlrpl.files import atomic
from mlrpl.precision import fastest
from mlrpl.provenance import instructions

MEGABYTE = 2**20


def capabilities(device: torch.device) -> dict[str, Any]:
    """The machine in words: name, threads, instructions, and the precision that the package takes there."""
    facts: dict[str, Any] = {"device": device_name(device), "precision": fastest(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            **facts,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return {**facts, "threads": torch.get_num_threads(), "instructions": sorted(instructions())}


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """The best that a large matrix product (TFLOP/s, in the precision taken) and a large copy (GB/s) reach here."""
    large = not quick and device.type == "cuda"
    side, volume = (8192, 2048 * MEGABYTE) if large else (1024, 64 * MEGABYTE)
    dtype = getattr(torch, fastest(device))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(volume // 4, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device) for _ in range(10))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return {"tflops": 2 * side**3 / product / 1e12, "gb_per_s": 2 * volume / copy / 1e9}


class Traffic(TorchDispatchMode):
    """Bytes that the operations within read and write, each tensor once an operation; views are free.

    Caches make the real traffic smaller, scratch memory makes it larger: an estimate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do what was asked."""
        result = function(*args, **(kwargs or {}))
        schema = function._schema
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def achieved(step: Callable[[], object], took: float) -> dict[str, float]:
    """TFLOP (of convolutions and matrix products) and GB of a step, and both per second of `took`."""
    with FlopCounterMode(display=False) as counter:
        step()
    with Traffic() as traffic:
        step()
    flop = counter.get_total_flops()
    return {
        "step_tflop": flop / 1e12,
        "step_gb": traffic.bytes / 1e9,
        "tflops": flop / took / 1e12,
        "gb_per_s": traffic.bytes / took / 1e9,
    }


def timeline(step: Callable[[], object], device: torch.device, path: Path) -> list[dict[str, Any]]:
    """One step under torch.profiler: a Chrome trace (chrome://tracing, ui.perfetto.dev) and where the time goes.

    Returns:
        The costliest operations: name, calls, milliseconds on the device, share.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as profiler:
        step()
        synchronise(device)
    with atomic(path) as partial:
        raw = partial.with_suffix(".json")
        try:
            profiler.export_chrome_trace(str(raw))
            trace = json.loads(raw.read_text(encoding="utf-8"))
        finally:
            raw.unlink(missing_ok=True)
        kept = {"traceEvents": trace["traceEvents"], "displayTimeUnit": trace.get("displayTimeUnit", "ms")}
        partial.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    # A GPU's time is told twice: of each kernel, and of the operation that launched it.
    kernels = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    events = kernels if gpu else profiler.key_averages()
    total = math.fsum(getattr(e, field) for e in events) or 1
    top = sorted(events, key=lambda e: -getattr(e, field))[:15]
    return [
        {
            "operation": e.key,
            "calls": e.count,
            "milliseconds": getattr(e, field) / 1e3,
            "share_percent": 100 * getattr(e, field) / total,
        }
        for e in top
    ]
