"""Ground floor of every wing: find the MoE layers of a model, watch their routing, multiply by their weights.

No model class is known by name here.

    moe_layers.py        find every MoE layer by transformers' contracts, whatever the family and what wraps it
    unseen_experts.py    blocks outside of transformers' experts interface, and models without any layer
    watch_routing.py     every routing decision while the model runs, and another in its place
    router_scores.py     the rule by which a router's logits become weights, recognised from what it computed
    skipped_slots.py     slots without an expert, and whether experts are spread over processes
    storage.py           storage of one layer's experts: the protocol, `storage_of`, dense tensors
    packed_storages.py   storages of weights that are computed when they are read: parametrisations, tensor classes
    fp8_storage.py       storage of fp8 values with inverse scales, as transformers stores them
    expert_rows.py       rows in expert order times one expert's matrix after the other
    geometry.py          names and logical shapes of an experts module's matrices
    path_ranges.py       paths of many layers in few words
"""
