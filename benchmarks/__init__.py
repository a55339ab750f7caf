"""Side-by-side speed and memory: `python -m benchmarks.run --suite cpu|gpu|growth`."""
