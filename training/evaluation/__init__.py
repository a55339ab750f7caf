"""One program a protocol: how good a trained model is, and how fast."""
