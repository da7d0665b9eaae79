"""The model card of a run that trains a base model and an expert adapter, from its `report.json`."""

from collections.abc import Mapping
from typing import Any

from hf_moe.hub.model_card import NOT_MEASURED, cell, fenced, render_card, table

Report = Mapping[str, Any]


def run_card(report: Report) -> str:
    """The card as Markdown with a YAML head.

    Args:
        report: The JSON value that the quickstart recipe writes.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    new = report["new_domain"]
    values = {
        "title": f"hf_moe quickstart: a small Mixture-of-Experts, adapted to {cell(new)}",
        "summary": _summary(report),
        "quickstart_code": _CODE,
        "facts": _facts(report),
        "evaluation": _evaluation(report),
        "evaluation_note": _EVALUATION_NOTE,
        "routing": _routing(report),
        "routing_note": _ROUTING_NOTE,
        "training": _training(report),
        "data": _data(report),
        "sample": _sample(report),
        "limits": _LIMITS,
        "command": report["command"],
        "date": report["date"],
        "versions": table(["library", "version"], list(report["versions"].items())),
    }
    return render_card(values, metadata=_METADATA)


_METADATA: dict[str, Any] = {
    "language": "en",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["moe", "mixture-of-experts", "hf-moe", "lora"],
}

_CODE = """import hf_moe  # registers the architecture
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
model = PeftModel.from_pretrained(model, "adapter")
tokenizer = AutoTokenizer.from_pretrained("model")
inputs = tokenizer("Permission is hereby granted", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""

_EVALUATION_NOTE = (
    "Bits per byte: the negative log2-likelihood of all held-out text, divided by its UTF-8 bytes; lower is better. "
    "Sliding windows of the model's context that advance by half of it, each document on its own. One run, one seed: "
    "no error bars."
)

_ROUTING_NOTE = (
    "Agreement: the share of held-out tokens whose set of experts is the same before and after adaptation. The router "
    "is frozen, its inputs are not: the adapters of earlier layers move them."
)

_LIMITS = (
    "A demonstration: a few million parameters, minutes of training. It writes text-like noise and knows nothing. "
    "The training text carries the licences of its sources (Python's standard library and the packages installed "
    "beside it); clear them before you publish weights trained on it."
)


def _summary(report: Report) -> str:
    parameters = report["base"]["parameters"]
    values = report["evaluation"]["bits_per_byte"]
    new = report["new_domain"]
    old = [name for name in values["before"] if name != new]
    worst = max(values["after"][name] - values["before"][name] for name in old)
    return (
        f"A sparse language model of {parameters['total']:,} parameters ({parameters['active']:,} active per token), "
        f"trained from scratch, then adapted to a domain it had not seen (`{new}`) by LoRA on its experts with the "
        f"router frozen: {values['before'][new]:.3f} to {values['after'][new]:.3f} bits per byte there, at most "
        f"{worst:+.3f} on the {len(old)} domains it knew."
    )


def _facts(report: Report) -> str:
    choices, base, adapter = report["choices"], report["base"], report["adapter"]
    parameters = base["parameters"]
    same = "equal" if adapter["router_sha256_before"] == adapter["router_sha256_after"] else "DIFFERENT"
    return table(
        ["fact", "value"],
        [
            ("architecture", "hf_moe (decoder)"),
            ("parameters: total / active per token", f"{parameters['total']:,} / {parameters['active']:,}"),
            ("parameters trained by the adapter", f"{adapter['trainable_parameters']:,}"),
            ("layers, hidden size", f"{choices['layers']}, {choices['hidden_size']}"),
            (
                "experts per layer / chosen per token / shared",
                f"{choices['experts']} / {choices['experts_per_token']} / 1",
            ),
            ("expert width", f"{choices['expert_width']}"),
            ("router", "softmax, top-k; load balancing and z-loss in training"),
            ("context, vocabulary", f"{choices['row_length']} tokens, {choices['vocab_size']} (byte-level BPE)"),
            ("dtype", "float32"),
            (f"router SHA-256 before and after adaptation ({same})", adapter["router_sha256_after"]),
            ("logits after loading back", "equal" if report["load_back"]["logits_equal"] else "DIFFERENT"),
        ],
    )


def _evaluation(report: Report) -> str:
    values, text = report["evaluation"]["bits_per_byte"], report["text"]
    rows = [
        (
            f"{name} (new)" if name == report["new_domain"] else name,
            text[name]["held_out_bytes"],
            values["before"][name],
            values["after"][name],
            f"{values['after'][name] - values['before'][name]:+.3f}",
            values["adapter off"][name],
        )
        for name in values["before"]
    ]
    return table(["domain", "held-out bytes", "before", "after", "change", "adapter off"], rows)


def _routing(report: Report) -> str:
    evaluation = report["evaluation"]
    balance = evaluation["balance_before"]
    layers = range(len(balance["load_entropy"]))
    agreement = table(
        ["agreement", *(f"layer {layer}" for layer in layers)],
        [(name, *values) for name, values in evaluation["routing_agreement"].items()],
    )
    load = table(
        ["load of the base model", *(f"layer {layer}" for layer in layers)],
        [
            ("entropy (1 = balanced)", *balance["load_entropy"]),
            ("busiest expert above the mean (0 = balanced)", *balance["max_violation"]),
        ],
    )
    return f"{agreement}\n\n{load}"


def _training(report: Report) -> str:
    choices, seconds = report["choices"], report["seconds"]
    rows = [
        (
            title,
            report[part]["steps"],
            report[part]["tokens"],
            f"{choices[rate]:g}",
            _seconds(report, part),
            report[part]["log"][-1]["loss"],
        )
        for part, title, rate in (
            ("base", "base model", "learning_rate"),
            ("adapter", "adapter", "adapter_learning_rate"),
        )
    ]
    machine = report["machine"]
    runs = table(["run", "steps", "tokens", "peak learning rate", "seconds", "last loss"], rows)
    return (
        f"{runs}\n\nAdamW (fused), cosine schedule, {choices['rows_per_step']} rows of {choices['row_length']} tokens "
        f"a step, seed {choices['seed']}; LoRA rank {choices['adapter_rank']} on `gate_up_proj` and `down_proj` of "
        f"all experts; {choices['replay']:.0%} of the adapter's rows replay the old domains. All stages took "
        f"{sum(seconds.values()):.0f} s on {machine['torch_threads']} CPU thread ({machine['architecture']}). Energy: "
        f"{NOT_MEASURED}."
    )


def _data(report: Report) -> str:
    rows = [
        (name, counts["train_documents"], counts["train_bytes"], counts["train_tokens"], counts["held_out_documents"])
        for name, counts in report["text"].items()
    ]
    return table(["text", "documents", "bytes", "tokens", "held-out documents"], rows)


def _sample(report: Report) -> str:
    sample = report["load_back"]["sample"]
    parts = (("Prompt", "prompt"), ("Base model", "base"), ("With the adapter", "adapted"))
    return "\n\n".join(f"{title}:\n\n{fenced(sample[key])}" for title, key in parts)


def _seconds(report: Report, part: str) -> str:
    if part in report["interrupted"]:
        return f"{NOT_MEASURED} (interrupted)"
    return f"{report['seconds'][part]:.0f}"
