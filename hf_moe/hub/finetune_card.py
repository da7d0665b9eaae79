"""The results folder of a fine-tuning recipe: report, plots, and the model card written from the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_moe.hub.model_card import NOT_MEASURED, cell, render_card, table
from hf_moe.observability.plots import plot_bits_per_byte, plot_loss
from hf_moe.training.checkpoints import whole_folder, write_json, write_text

Report = Mapping[str, Any]

_EVALUATION_NOTE = (
    "Bits per byte: the negative log2-likelihood of the held-out tokens that the loss is taken on, divided by the "
    "UTF-8 bytes of their text; lower is better. One run, one seed: no error bars."
)
_ROUTING_NOTE = (
    "Agreement: the share of held-out tokens whose set of experts is the same before and after. A frozen router is no "
    "frozen routing: what earlier layers learn moves its inputs."
)
_LIMITS = (
    "Measured on text held out from the same data sets only: no standard benchmark, no safety evaluation. The weights "
    "carry the licences of the base model and of the data; clear them before you publish."
)
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "adapter")"""
_LOAD_MODEL = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model")"""


def write_results(folder: Path, report: Report, *, saved: str, needs_hf_moe: bool = False) -> None:
    """Write `report.json`, `plots/` and `README.md`; each file is whole or not there.

    Args:
        saved: What lies beside them: `adapter` or `model`.
        needs_hf_moe: Whether loading an adapter takes `import hf_moe`, whatever the base.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    with whole_folder(folder / "plots") as plots:
        plot_loss(plots / "loss.png", {report["recipe"]: report["log"]})
        values = {
            key: {name: domain[key]["bits_per_byte"] for name, domain in report["domains"].items()}
            for key in ("before", "after")
        }
        plot_bits_per_byte(plots / "bits_per_byte.png", values)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", finetune_card(report, saved=saved, needs_hf_moe=needs_hf_moe))


def finetune_card(report: Report, *, saved: str, needs_hf_moe: bool = False) -> str:
    """The card as Markdown with a YAML head, from the report alone."""
    base = report["choices"]["model"]
    code = _LOAD_ADAPTER.format(base=base) if saved == "adapter" else _LOAD_MODEL
    if needs_hf_moe or report["model_type"] == "hf_moe":
        code = f"import hf_moe  # registers\n{code}"
    values = {
        "title": f"{cell(report['recipe'])} on {cell(base)}",
        "summary": _summary(report),
        "code": code,
        "facts": _facts(report),
        "evaluation": _evaluation(report),
        "evaluation_note": _EVALUATION_NOTE,
        "routing": _routing(report),
        "routing_note": _ROUTING_NOTE,
        "training": _training(report),
        "data": _data(report),
        "limits": _LIMITS,
        "command": report["command"],
        "date": report["date"],
        "versions": table(["library", "version"], list(report["versions"].items())),
    }
    return render_card(values, metadata=_metadata(report, saved), template="finetune_card.md.j2")


def _metadata(report: Report, saved: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": "peft" if saved == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "mixture-of-experts", "hf-moe"],
    }
    if "/" in report["choices"]["model"]:  # a name on the Hub, not a folder
        metadata["base_model"] = report["choices"]["model"]
    return metadata


def _summary(report: Report) -> str:
    changes = {
        name: domain["after"]["bits_per_byte"] - domain["before"]["bits_per_byte"]
        for name, domain in report["domains"].items()
    }
    best, worst = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
    trained, total = report["parameters"]["trained"], report["parameters"]["total"]
    return (
        f"{trained:,} of {total:,} parameters trained in {report['steps']:,} steps. Bits per byte of held-out text: "
        f"{changes[best]:+.3f} on {cell(best)}, {changes[worst]:+.3f} on {cell(worst)} (lower is better)."
    )


def _facts(report: Report) -> str:
    parameters, router = report["parameters"], report["router_sha256"]
    same = "equal" if router["before"] == router["after"] else "DIFFERENT"
    rows = [
        ("base model", report["choices"]["model"]),
        ("parameters: total / active per token", f"{parameters['total']:,} / {parameters['active']:,}"),
        ("parameters trained", f"{parameters['trained']:,}"),
        (f"router SHA-256 before and after ({same})", router["after"]),
        ("size of what was saved", f"{report['saved_bytes']:,} bytes" if "saved_bytes" in report else NOT_MEASURED),
    ]
    return table(["fact", "value"], rows)


def _evaluation(report: Report) -> str:
    rows = [
        (
            name,
            domain["before"]["bytes"],
            domain["before"]["bits_per_byte"],
            domain["after"]["bits_per_byte"],
            f"{domain['after']['bits_per_byte'] - domain['before']['bits_per_byte']:+.3f}",
        )
        for name, domain in report["domains"].items()
    ]
    return table(["domain", "held-out bytes", "before", "after", "change"], rows)


def _routing(report: Report) -> str:
    agreement = {name: domain["routing_agreement"] for name, domain in report["domains"].items()}
    layers = range(len(next(iter(agreement.values()))))
    return table(
        ["agreement", *(f"layer {layer}" for layer in layers)], [(name, *each) for name, each in agreement.items()]
    )


def _training(report: Report) -> str:
    choices = ", ".join(f"{name} {value}" for name, value in report["choices"].items() if name != "model")
    machine = report["machine"]
    return (
        f"{report['steps']:,} steps, {report['seconds_per_step']:.2f} s each ({machine['device']}, "
        f"{machine['architecture']}); {cell(choices)}. Energy: {NOT_MEASURED}."
    )


def _data(report: Report) -> str:
    rows = [
        (name, f"{domain['share']:.0%}", domain["examples"], domain["tokens"], domain["loss_tokens"])
        for name, domain in report["domains"].items()
    ]
    return table(["data set", "share of the rows", "examples", "tokens", "tokens with loss"], rows)
