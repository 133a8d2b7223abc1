"""What the dropout before each head leaves of a volume's channels, and what that does to the losses.

In training each of the `filters` channels before a head is dropped at even odds, anew for each volume and decoder
(`mlrpl.networks.Decoder`). A draw that leaves one or none takes from the decoder what it knows of that volume: both
losses jump, in that iteration, whatever the images show. With 16 filters, two decoders and four volumes, one in 60
iterations leaves some volume two channels or fewer; with 8 filters seven in ten do.

    python -m mlrpl.channels STUDY RUN               the log of a run trained on a CPU, beside its draws
    python -m mlrpl.channels STUDY RUN --batches 20  a run's final weights, the draws made anew

A run's folder must be at hand. Rows are printed as CSV.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mlrpl.config import Run
from mlrpl.data import Batch
from mlrpl.losses import batch_dice
from mlrpl.methods import Method
from mlrpl.networks import DEPTHS
from mlrpl.precision import Precision, computing
from mlrpl.reliability import mutual_loss
from mlrpl.study import Workplace, trained
from mlrpl.training import make_batches, seed_iteration

CPU = torch.device("cpu")
DRAWS = 25  # of each batch


def drawn(run: Run, iteration: int, decoders: int = 2) -> Tensor:
    """Channels that were kept before each head in one iteration of a run on a CPU: (decoders, volumes), integers.

    Only for methods whose step is one pass through encoder and decoders, as MLRPL's, MC-Net's and V-Net's: their draws
    follow from seed and iteration, the bottleneck's first.
    """
    seed_iteration(run.seed, iteration, CPU)
    volumes, filters = sum(run.settings.batch), run.settings.filters
    F.dropout3d(torch.ones(volumes, filters * 2 ** (len(DEPTHS) - 1), 1, 1, 1))
    maps = [F.dropout3d(torch.ones(volumes, filters, 1, 1, 1)) for _ in range(decoders)]
    return torch.stack([(kept > 0).sum((1, 2, 3, 4)) for kept in maps])


def beside_log(run: Run, log: Path, decoders: int = 2) -> pd.DataFrame:
    """Losses of a run on a CPU by the fewest channels that any volume was left before any head; a row a number.

    The first tenth of the run, in which all losses are high, is left out.
    """
    rows = pd.read_csv(log)
    rows = rows[rows["iteration"] > run.settings.iterations / 10]
    fewest = [int(drawn(run, iteration, decoders).min()) for iteration in rows["iteration"]]
    found = rows.assign(kept=fewest).groupby("kept", as_index=False)
    return found.agg(
        n=("mutual", "size"),
        mutual_median=("mutual", "median"),
        mutual_90=("mutual", lambda values: values.quantile(0.9)),
        mutual_max=("mutual", "max"),
        dice_median=("dice", "median"),
        dice_10=("dice", lambda values: values.quantile(0.1)),
    )


def redrawn(method: Method, batches: Iterable[Batch], precision: Precision, draws: int) -> pd.DataFrame:
    """Mutual loss and Dice of batches in training mode, the dropout before the heads drawn anew; a row a draw.

    `kept` is the fewest channels that any volume was left before any head; the first row of each batch is without that
    dropout, so it is all of them. The bottleneck's dropout is drawn once a batch.

    Args:
        method: MLRPL, with trained weights, on the CPU; is put into training mode.
        batches: what to feed.
        precision: to compute in.
        draws: for each batch.
    """
    method.train()
    network, filters, rows = method.network, method.settings.filters, []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        ones = torch.ones(len(network.decoders), len(batch.image), filters, 1, 1, 1)
        with torch.no_grad(), computing(CPU, precision):
            maps = network.encoder(batch.image.to(memory_format=torch.channels_last_3d))
            whole = [decoder.levels(maps)[-1] for decoder in network.decoders]
            for draw in range(draws + 1):
                masks = torch.stack([F.dropout3d(each) for each in ones]) if draw else ones
                features = [each * mask.to(each.dtype) for each, mask in zip(whole, masks, strict=True)]
                logits = [decoder.head(f) for decoder, f in zip(network.decoders, features, strict=True)]
                rows.append(
                    {
                        "batch": number,
                        "draw": draw,
                        "kept": int((masks > 0).sum(2).min()),
                        "mutual": mutual_loss(logits, features).item(),
                        "dice": batch_dice(logits[0][: len(batch.label)], batch.label).item(),
                    }
                )
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    """Print a run's rows."""
    parser = argparse.ArgumentParser("python -m mlrpl.channels", description="Losses by channels that dropout left.")
    parser.add_argument("study")
    parser.add_argument("run")
    parser.add_argument("--runs", default="runs", help="folder of runs")
    parser.add_argument("--batches", type=int, default=0, help="feed so many to the final weights; 0: read the log")
    asked = parser.parse_args(arguments)
    place = Workplace(asked.study, asked.runs)
    job = place.job(asked.run)
    if job.run.method != "mlrpl" or not job.run.settings.head_dropout:
        parser.error(f"{asked.run}: only runs of mlrpl with dropout before the heads")
    if not asked.batches and not job.provenance["train"]["device"].startswith("CPU"):
        parser.error(f"{asked.run} was trained on a GPU, whose draws are not known afterwards: give --batches")
    if asked.batches:
        method, precision = trained(job, place.store, CPU)
        batches = make_batches(job.run, place.store, method)
        after = job.run.settings.iterations  # what training did not see
        found = redrawn(method, (batches(after + 1 + n) for n in range(asked.batches)), precision, DRAWS)
    else:
        found = beside_log(job.run, job.folder / "log.csv")
    found.assign(run=asked.run).to_csv(sys.stdout, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
