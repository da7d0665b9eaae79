"""The `hf_moe` architecture: exactly the files that ship with a checkpoint.

They import one another by one dot, and nothing else of hf_moe. A forward, in the order of the data:

    configuration_hf_moe.py  HfMoeConfig, every value checked when it is built
    modeling_hf_moe.py       router, experts, block, decoder layer, model and its four heads
    masks.py                 the tokens that attention, routing and a classification head take
    routing.py               the rule of the router, on tensors: scores, choice, weights, capacity
    losses.py                load balancing loss and router z-loss, from the decisions of the routers
    late_gradient.py         gradients for decisions under reentrant gradient checkpointing
    outputs.py               outputs of the model and its heads

The checkpoint:

    checkpoint_layout.py     one tensor for every expert on disk, fused in memory; checks on load, safe saves
    checkpoint_files.py      safetensors files and their index, checked to be whole
    shipped_code.py          code in a saved folder, compared with the code here
    hub_upload.py            a push in one commit, which deletes weights that it replaces

    transformers_names.py    names that differ between versions of transformers, looked up or refused
"""
