"""What results are called in rows: columns and values that evaluation writes and tables read, without PyTorch."""

IDENTITY = ["study", "method", "variant", "labelled", "seed"]  # columns that say of a row whose it is
SELECTIONS = ["last", "published"]
LARGEST = "decoder1-largest"  # outputs beside a method's own, see `mlrpl.evaluation`
OWN = "decoder1-own"
