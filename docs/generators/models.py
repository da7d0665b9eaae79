"""The table of supported models, from what try_families.py found."""

import json
import re
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("families.json")
_YES, _NO = '<span class="yes">✓</span>', '<span class="no">–</span>'
_COLUMNS = (
    "Model",
    "Example",
    "Kernels",
    "Expert LoRA",
    "Adapter experts",
    "LoRA for servers",
    "Packing",
    "Own balancing loss",
    "Our balancing loss",
    "Bias update",
)


def tables() -> str:
    """Summary, table and notes as Markdown with HTML."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    families = dict(sorted(data["families"].items(), key=lambda item: name_of(item[1]).lower()))
    return "\n\n".join((_summary(data["transformers"], families), _table(families), _LEGEND, _notes(families)))


def name_of(family: dict[str, Any]) -> str:
    """What the classes of a family begin with: `Qwen3Moe`."""
    return re.sub(r"(For[A-Z]\w+|(Text|Thinker|Talker)*Model)$", "", family["classes"][1])


def _summary(version: str, families: dict[str, dict[str, Any]]) -> str:
    def count(field: str) -> int:
        return sum(family[field] == "" for family in families.values())

    runs = sum(not any(family["backends"].values()) for family in families.values())
    return (
        f"Tried with transformers {version}: **{len(families)} families**, each as a tiny model with random weights "
        f"in the real classes, on a CPU. The Triton kernels for GPUs ran in Triton's interpreter.\n\n"
        f"- Kernels: {runs} run all four [backends](backends.md) and give what transformers' own code gives.\n"
        f"- Expert LoRA: {count('lora')}. Adapter experts: {count('adapter_experts')}.\n"
        f"- LoRA rewritten with a pair of factors for each expert: {count('per_expert')}; for the others servers read "
        f"the adapter as PEFT saves it.\n"
        f"- Packing: {count('packing')} keep packed examples apart; the others train with `packing: false`.\n"
        f"- Balancing: {sum(f['own_balancing'] for f in families.values())} have a balancing loss in transformers, "
        f"{sum(not f['balancing']['aux_loss'] for f in families.values())} take the one of hf_moe without a further "
        "setting."
    )


def _table(families: dict[str, dict[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for title in _COLUMNS)
    rows = "\n".join(_row(family) for family in families.values())
    return (
        f'<div class="table-scroll" tabindex="0" role="region" aria-label="Supported models">\n'
        f'<table class="models"><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>\n</div>'
    )


def _row(family: dict[str, Any]) -> str:
    checkpoint, balancing = family["checkpoint"], family["balancing"]
    link = f'<a href="https://huggingface.co/{escape(checkpoint)}">{escape(checkpoint)}</a>' if checkpoint else ""
    name = escape(name_of(family))
    cells = (
        link,
        _mark(not any(family["backends"].values())),
        _mark(not family["lora"]),
        _mark(not family["adapter_experts"]),
        "per expert" if not family["per_expert"] else "as saved",
        _mark(not family["packing"]),
        _mark(family["own_balancing"]),
        _mark(not balancing["aux_loss"]),
        _mark(not balancing["bias_update"]),
    )
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}<br><code>{escape(family["model_type"])}</code></th>{inside}</tr>'


def _mark(works: bool) -> str:
    return _YES if works else _NO


_LEGEND = """
Example
:   The checkpoint that transformers' documentation of the configuration names; for a few families it is a relative.

Kernels
:   `hf_moe_triton`, `hf_moe_cpu`, `hf_moe_grouped` and `hf_moe_reference` all run and agree with the model's own code.

LoRA for servers
:   *per expert*: `hf_moe.export_adapter` writes a pair of factors for each expert, and PEFT reads it back. *as saved*:
    checkpoints of this family hold fused experts, so servers read what PEFT saves. See [Serve](how-to/serve.md).

Packing
:   Several examples share a row and do not see each other. `–`: set `packing: false`.

Own balancing loss
:   transformers returns an auxiliary loss when asked for `output_router_logits`.

Our balancing loss, bias update
:   `BalancingConfig(aux_loss_coef=...)` and `bias_update_rate=...`; see [Balance](how-to/balance.md).
"""
_FIELDS = {
    "lora": "Expert LoRA",
    "adapter_experts": "Adapter experts",
    "per_expert": "LoRA for servers",
    "packing": "Packing",
    "aux_loss": "Our balancing loss",
    "z_loss": "Router z-loss",
    "bias_update": "Bias update",
}


def _notes(families: dict[str, dict[str, Any]]) -> str:
    """Every reason against something, once, with the families that it holds for."""
    holds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for family in families.values():
        reasons = {**family, **family["balancing"]}
        for field, title in _FIELDS.items():
            if reasons[field]:
                holds[title, _general(reasons[field])].append(name_of(family))
    parts = ["## Limits, and why", "What hf_moe says where the table has `–` or *as saved*. `…` stands for a name."]
    for title in _FIELDS.values():
        for reason, names in ((key[1], names) for key, names in holds.items() if key[0] == title):
            parts.append(f"**{title}** ({len(names)}): “{reason}” — {', '.join(dict.fromkeys(names))}")
    return "\n\n".join(parts)


def _general(reason: str) -> str:
    """A reason without the names of one family."""
    reason = re.sub(r"(?<![=\w])'[^' ]+'|\b\w+(ForCausalLM|For[A-Z][a-z]\w+|Model)\b", "…", reason)
    return escape(
        re.sub(r"\(to [^)]*\)|\(\d+ in all\)", "", reason).replace("  ", " ").replace(" ,", ","), quote=False
    )
