"""The pages of the API: what mkdocstrings is asked for."""

import ast
from pathlib import Path

import hf_moe

# the public names of hf_moe, in the order of a fine-tuning; a test compares them with the package's own list
NAMES = {
    "Find and explain": ("moe_layers", "explain", "register"),
    "Fine-tune": (
        "expert_lora_config",
        "accelerate_adapters",
        "merge_and_check",
        "AdapterExpertsConfig",
        "load_adapter",
        "export_adapter",
    ),
    "Keep the router": ("freeze_router", "router_hash", "verify_router_frozen", "RouterFreezeCallback"),
    "Train": (
        "MoeTrainer",
        "BalancingConfig",
        "RoutingMetricsCallback",
        "CollapseCallback",
        "SafeCheckpointMixin",
    ),
    "See the routing": ("record_routing",),
    "The hf_moe architecture": ("HfMoeConfig", "HfMoeModel", "HfMoeForCausalLM"),
}
# modules that people import from, by part
MODULES = {
    "Adapters": (
        "adapters.frozen_router",
        "adapters.select_experts",
        "adapters.expert_selection",
        "adapters.esft",
        "adapters.readable",
    ),
    "Routing": (
        "layers.moe_layers",
        "layers.watch_routing",
        "observability.replay",
        "observability.routing_trace",
        "observability.health",
        "observability.thresholds",
    ),
    "Training": (
        "training.balancing.mixin",
        "training.rollback",
        "training.same_weights",
        "training.callbacks",
    ),
    "Memory": ("planner.fit",),
    "TRL": ("finetuning.trl",),
    "Data and evaluation": ("data.sources", "evaluation.bits_per_byte", "evaluation.paired"),
    "Compare": ("comparison.run", "comparison.routing_agreement", "comparison.served_counts"),
    "Hub": ("hub.push", "hub.renew_code", "hub.cards.card", "loading.pretrained"),
}
_NAMES_INTRO = """# API

`import hf_moe` offers these names. Importing registers choices with transformers and PEFT and loads nothing heavy:
each name is imported when you first use it. [More modules](modules.md) lists what is imported from its own module.
"""
_MODULES_INTRO = """# More modules

Import these from the module that is named. What starts with an underscore, and modules that are not on this page, may
change without notice.
"""


def homes() -> dict[str, str]:
    """Full path of every public name, from the stub of the package."""
    stub = ast.parse(Path(hf_moe.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}


def names_page() -> str:
    known = homes()
    parts = [_NAMES_INTRO]
    for title, names in NAMES.items():
        parts.append(f"## {title}\n")
        parts += [_directive(known[name], f"hf_moe.{name}") for name in names]
    return "\n".join(parts)


def modules_page() -> str:
    parts = [_MODULES_INTRO]
    for title, modules in MODULES.items():
        parts.append(f"## {title}\n")
        parts += [_directive(f"hf_moe.{module}", f"hf_moe.{module}") for module in modules]
    return "\n".join(parts)


def _directive(path: str, heading: str) -> str:
    return f"::: {path}\n    options:\n      heading: {heading}\n      toc_label: {heading.removeprefix('hf_moe.')}\n"
