"""What the programs of one task share."""
