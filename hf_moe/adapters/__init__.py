"""Adapters on Mixture-of-Experts models of any family, and routers that stay frozen.

LoRA on fused experts:

    expert_lora.py       run PEFT's LoRA through its factors, without `W + BA`
    lora_targets.py      names of the experts' parameters for PEFT
    lora_options.py      options of PEFT's `LoraConfig` that reach experts
    readable.py          refusal of an adapter that PEFT could not read again

Other methods:

    adapter_experts/     small routed experts beside those of the base, as a PEFT method
    esft.py              train chosen experts alone
    select_experts.py    measure the experts that a domain uses
    expert_selection.py  the chosen experts: a value to save, load, draw and match with a model

Frozen routers:

    frozen_router.py     freeze routers, prove that they stayed frozen, record their hash
    router_values.py     the hash over the values of routers, whatever their dtype
    sharded.py           weights of which a process holds a part

Adapters as files:

    load_adapter.py      load an untrusted adapter
    adapter_files.py     rules for its files, before a model is touched
    unchanged_base.py    proof that the base is what it was
    export.py            a pair of factors for every expert, for servers and older tools
    per_expert.py        these pairs and PEFT's form, both ways
"""
