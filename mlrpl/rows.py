"""What results are called in rows: columns and values that evaluation writes and tables read, without PyTorch."""

IDENTITY = ["study", "method", "variant", "labelled", "seed"]  # columns that say of a row whose it is
SELECTIONS = ["last", "published"]
LARGEST = "decoder1-largest"  # outputs beside a method's own, see `mlrpl.evaluation`
OWN = "decoder1-own"


def run_name(variant: str, labelled: int, seed: int, fold: int | None = None) -> str:
    """What people call a run: variant, number of labelled cases, seed, and of a cross-validation the fold."""
    return f"{variant}-{labelled}-s{seed}" + (f"-f{fold}" if fold is not None else "")
