"""Does locality help, on real images, with our own programs? The runs and the analysis behind docs/evidence.md."""
