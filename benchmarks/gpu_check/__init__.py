"""Is the fused kernel right on this GPU, and is it faster? `python -m benchmarks.gpu_check`.

cells        what is checked and measured, phase by phase; plain data
lanes        processes that work cells off, a deadline, and what becomes of a cell whose process dies
work         one function for each kind of cell: correctness, speed, families, profiles
device       the GPU, or the processor that rehearses for it with Triton's `interpreter`
verdict      the decision, by a written rule, and the tables

The command itself (`__main__`), cells, lanes and verdict need only Python: what a kernel does to a process cannot reach
the one that writes the results.
"""
