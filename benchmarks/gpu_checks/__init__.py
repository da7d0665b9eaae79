"""Parts of `benchmarks/gpu_check.py`.

setting.py        sizes on a GPU, and tiny ones for Triton's interpreter
problems.py       random layers, and what plain torch makes of them
checks.py         every operator against float64, and what only a GPU shows
products.py       each kernel of the tile tables as one launch, with any tile
times.py          the benchmark's own comparison, layer by layer
sweep.py          the kernels with other tiles
profiles.py       time by kernel
facts.py          device, versions, commit, shipped tiles
predictions.py    predictions.json against a run: which assumption was wrong
tables.py         entries of a tile table from a sweep
command.py        the stages, one process each, and the summary
"""
