"""Parts of `benchmarks/gpu_check.py`.

What a run consists of:

    setting.py        sizes on a GPU, and tiny ones for Triton's interpreter
    problems.py       random layers, and what plain torch makes of them
    products.py       each kernel of the tile tables as one launch, with any tile

The stages, one process each:

    command.py        the command, the stages in order, the summary
    checks.py         every operator against float64, and what only a GPU shows
    times.py          the benchmark's own comparison, layer by layer
    sweep.py          the kernels with other tiles
    profiles.py       time by kernel

Its results:

    facts.py          date, device, versions, commit
    predictions.py    predictions.json against a run: which assumption was wrong
    tables.py         entries of a tile table from a sweep
"""
