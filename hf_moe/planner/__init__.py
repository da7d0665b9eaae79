"""Memory of a training, computed before anything is loaded: what `hf-moe info` prints and the recipes announce.

From the arithmetic up:

    step_memory.py   bytes of a training step from its parts; the one place that adds them up
    saved_bytes.py   what a forward keeps for backward, counted on any device
    shapes_only.py   a forward on the meta device, which has shapes and no values
    quantised.py     weights as a quantised checkpoint stores them, and as transformers holds them
    methods.py       the fine-tuning methods, each built on the meta device
    fit.py           all methods of one model, and the GPUs that hold them
    fit_table.py     the same as a table for a terminal
"""
