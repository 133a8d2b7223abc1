"""What the dropout before each head leaves of a volume's channels, and what that does to the losses.

In training each of the `filters` channels before a head is dropped at even odds, anew for each volume and decoder
(`mlrpl.networks.Decoder`). A draw that leaves one or none takes from the decoder what it knows of that volume: both
losses jump, in that iteration, whatever the images show. With 16 filters, two decoders and four volumes, one in 60
iterations leaves some volume two channels or fewer; with 8 filters seven in ten do.

    mlrpl channels STUDY RUN               the log of a run trained on a CPU, beside its draws
    mlrpl channels STUDY RUN --batches 20  a run's final weights, the draws made anew
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mlrpl.config import Run
from mlrpl.data import Batch
from mlrpl.errors import StudyError
from mlrpl.losses import batch_dice
from mlrpl.methods import Method
from mlrpl.networks import DEPTHS
from mlrpl.precision import Precision, computing
from mlrpl.reliability import mutual_loss
from mlrpl.study import Workplace, trained
from mlrpl.training import make_batches, seed_iteration

CPU = torch.device("cpu")
DRAWS = 25  # of each batch


def drawn(run: Run, iteration: int, decoders: int) -> Tensor:
    """Channels that were kept before each head in one iteration of a run on a CPU: (decoders, volumes), integers.

    Only for methods whose step is one pass through encoder and decoders, as MLRPL's, MC-Net's and V-Net's: their draws
    follow from seed and iteration, the bottleneck's first.
    """
    seed_iteration(run.seed, iteration, CPU)
    volumes, filters = sum(run.settings.batch), run.settings.filters
    F.dropout3d(torch.ones(volumes, filters * 2 ** (len(DEPTHS) - 1), 1, 1, 1))
    maps = [F.dropout3d(torch.ones(volumes, filters, 1, 1, 1)) for _ in range(decoders)]
    return torch.stack([(kept > 0).sum((1, 2, 3, 4)) for kept in maps])


def beside_log(run: Run, log: Path, decoders: int) -> pd.DataFrame:
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


def losses(place: Workplace, name: str, batches: int = 0) -> pd.DataFrame:
    """Of a run of MLRPL whose folder is at hand: its log beside its draws, or its final weights with draws made anew.

    Args:
        place: the study's.
        name: the run's.
        batches: how many to feed to the final weights, other ones than in training; 0: read the log.

    Raises:
        StudyError: for a run of another method or without that dropout, one that is not trained, or the log of one that
            was trained on a GPU.
    """
    job = place.job(name)
    if job.run.method != "mlrpl" or not job.run.settings.head_dropout:
        raise StudyError(f"run {name}: only a run of mlrpl with dropout before the heads has what is asked for")
    if not job.finished("train"):
        raise StudyError(f"run {name}: not trained here; mlrpl train {place.given} --only {name} does it")
    if not batches and not job.provenance["train"]["device"].startswith("CPU"):
        raise StudyError(f"run {name}: trained on a GPU, whose draws are not known afterwards; give --batches")
    method, precision = trained(job, place.store, CPU)
    if batches:
        fed, after = make_batches(job.run, place.store, method), job.run.settings.iterations
        found = redrawn(method, (fed(after + 1 + n) for n in range(batches)), precision, DRAWS)
    else:
        found = beside_log(job.run, job.folder / "log.csv", len(method.network.decoders))
    return found.assign(run=name)
