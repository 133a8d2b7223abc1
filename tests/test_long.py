"""Long runs: memory and speed after thousands of iterations are those of the first hundreds."""

import gc
import time

import numpy as np
import psutil
import pytest
import torch

from mlrpl.config import Dataset, Run
from mlrpl.data import prepare
from mlrpl.training import Trainer

ITERATIONS, BLOCK = 3000, 250


@pytest.mark.slow
def test_memory_and_speed_stay_flat_over_3000_iterations(tmp_path, monkeypatch):
    """With a checkpoint every few seconds and a check every 500 iterations; time is the process's own."""
    monkeypatch.setattr("mlrpl.training.CHECKPOINT_SECONDS", 5)
    dataset = Dataset(name="tiny", source="phantom", options={"train": 4, "test": 1, "size": [24, 24, 16]})
    store = prepare(dataset, None, tmp_path / "store")
    run = Run.model_validate({
        "study": "long", "variant": "mlrpl", "method": "mlrpl", "title": "MLRPL", "labelled": 2, "seed": 0,
        "settings": {
            "patch": (16, 16, 16), "stride": (8, 8, 16), "filters": 2, "iterations": ITERATIONS, "check_from": 500,
            "check_every": 500, "precision": "float32",
        },
    })  # fmt: skip
    process, step = psutil.Process(), Trainer.step
    memory, seconds, spent = [], [], 0.0

    def measured(self, iteration):
        nonlocal spent
        began = time.process_time()
        terms = step(self, iteration)
        spent += time.process_time() - began
        if iteration % BLOCK == 0:
            gc.collect()
            memory.append(process.memory_info().rss / 1e6)
            seconds.append(spent / BLOCK)
            spent = 0.0
        return terms

    monkeypatch.setattr(Trainer, "step", measured)
    (tmp_path / "run").mkdir()
    Trainer(run, store, tmp_path / "run", "0" * 16, torch.device("cpu")).train()
    print(f"MB: {np.round(memory).tolist()}; ms an iteration: {np.round(np.multiply(seconds, 1e3), 1).tolist()}")
    early, late = slice(1, 4), slice(-3, None)  # the first block warms up
    assert np.mean(memory[late]) - np.mean(memory[early]) < 20
    assert np.median(seconds[late]) < 1.3 * np.median(seconds[early])
