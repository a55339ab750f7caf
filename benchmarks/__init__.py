"""Side-by-side speed and memory: `benchmarks.run --suite cpu|gpu|growth`; the GPU kernel: `benchmarks.gpu_check`."""
