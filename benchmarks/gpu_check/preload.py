"""What the process imports from which the others are forked; only that one imports this."""

import gc

from . import work

gc.freeze()  # it is no garbage: collecting would only copy the memory that the processes share

__all__ = ["work"]
