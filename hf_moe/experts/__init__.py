"""Ways to run experts: `experts_implementation="hf_moe"` and its siblings.

A call goes from `backends` (what runs it) through `pipeline` (order and weights of rows) to a backend's operators.

    backends.py                every backend in one table, what `hf_moe` chooses of it, the forward of each
    request.py                 the record that a backend is chosen by, and one row of their table
    own_backends.py            the backends of hf_moe: what each refuses, what it suits, its operators
    crossover.py               from how many rows torch's grouped product is chosen, by chip (crossover.json)
    preferred.py               the backend that commands choose where none is named
    transformers_backends.py   the backends that transformers brings, and what each refuses
    pipeline.py                the steps of a layer over a backend's operators and any storage
    dispatch.py                the order of routed rows, and their weighted sum
    grouped.py                 one matrix product for each expert, in plain torch
    reference.py               the layer as a loop to read, for judging the others
    contract.py                what transformers' experts contract says of a module
    activation.py              the closed form of an expert's activation, found by trying it
    functional.py              gated experts given as tensors, not as a module of transformers
"""
