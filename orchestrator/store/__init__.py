"""Where the bytes are: models, contributions, states and small documents, named by their digests."""

from orchestrator.store.opening import open_store
from orchestrator.store.space import Reservation
from orchestrator.store.store import Store

__all__ = ["Reservation", "Store", "open_store"]
