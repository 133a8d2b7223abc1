"""Data: source → case store → patches."""

from mlrpl.data.ahead import Ahead
from mlrpl.data.patches import Batch, Batches
from mlrpl.data.prepare import SOURCES, prepare
from mlrpl.data.store import Case, Store, open_store

__all__ = ["SOURCES", "Ahead", "Batch", "Batches", "Case", "Store", "open_store", "prepare"]
