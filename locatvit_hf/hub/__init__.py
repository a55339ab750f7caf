"""Publishing: the card of a checkpoint, its repository, and what is in one before anyone runs its code."""
