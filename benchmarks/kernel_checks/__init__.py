"""Parts of `benchmarks/ahead_of_time.py`.

What is compiled, and whether it fits:

    cases.py            launches of every kernel, with the combinations of its features
    launches.py         launches recorded without a GPU
    compilation.py      a launch compiled for a chip, and the rules of that chip
    instructions.py     matrix instructions and inner loops, from the compiled text
    occupancy.py        programs that a multiprocessor runs at once

What it is estimated to take:

    layers.py           every launch of whole steps of the reference layers
    uniform.py          rows and tiles that uniform routing is expected to give
    traffic.py          what a launch multiplies and moves
    devices.py          rates of devices, and the time of a launch: all that is assumed
    estimates.py        the rows of the table
    table.py            the committed table, and what may not get worse
    rendering.py        the table for readers
"""
