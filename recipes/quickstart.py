"""Train a small Mixture-of-Experts on real text, teach it a new domain with its router frozen, and check everything.

    hf-moe quickstart                                        # or: python recipes/quickstart.py
    hf-moe quickstart --data notes.txt --minutes 10          # your own text becomes the new domain

Hardware: 2 CPU cores, 2 GB of memory, no GPU, no download. Time: 5 minutes, with the CPU kernels built before.
The text is what every Python installation carries, so numbers differ a little between versions of Python and of the
packages; with these the same, the same arguments give the same numbers.

Expected (seed 0, 5 minutes, CPython 3.11, versions of constraints.txt; bits per byte of held-out text):

- the base model's training loss falls from 7.1 to 4.3; it needs 2.4 bits for a byte of code, 2.4 docs, 3.2 readme, 1.1
  arithmetic, and 3.3 for legal text, which it has not seen;
- the adapter lowers legal to 3.0, and raises no other domain by more than 0.03;
- with the adapter off every number is exactly the base model's; the router's SHA-256 is the same before and after;
- freezing the router does not freeze the routing: 61 to 77 % of the legal tokens keep their experts in layers 1 to 3.
"""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import (
    freeze_router,
    router_hash,
    verify_adapter_without_router,
    verify_router_frozen,
)
from hf_moe.comparison.routing_agreement import RoutingChoices, record_choices, routing_agreement
from hf_moe.data.bad_rows import DataError
from hf_moe.data.corpus import EMBEDDED, Domain, embedded_corpus
from hf_moe.data.packing import PackedRows, mix, pack
from hf_moe.data.text_files import read_domains
from hf_moe.data.tokenizer import encode_documents, train_tokenizer
from hf_moe.evaluation.bits_per_byte import bits_per_byte
from hf_moe.finetuning.surroundings import one_thread, quiet
from hf_moe.hub.cards.quickstart import quickstart_card
from hf_moe.io.stages import ResumableRun, RunRefusedError
from hf_moe.io.whole_files import whole_folder, write_json, write_text
from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.observability.explain import explain
from hf_moe.observability.plots import plot_bits_per_byte, plot_expert_load, plot_loss
from hf_moe.observability.recording import record_routing
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.trace_texts import trace_texts
from hf_moe.training.callbacks import BalanceProgress, RouterFreezeCallback
from hf_moe.training.trainer import MoeTrainer

LIBRARIES = ("hf-moe", "torch", "transformers", "peft", "tokenizers")


@dataclass(frozen=True)
class Quickstart:
    """All choices of the recipe. The first five are the command's options."""

    output: Path = Path("quickstart-output")
    data: list[Path] = field(default_factory=list)
    domain: str | None = None  # the new domain; None: the first of `data`, or else `default_domain`
    minutes: float = 5.0
    seed: int = 0

    default_domain: str = "legal"
    train_bytes: int = 1_200_000  # at most, per domain
    held_out_bytes: int = 50_000
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    experts_per_token: int = 2
    expert_width: int = 128
    row_length: int = 256
    rows_per_step: int = 10
    learning_rate: float = 4e-3
    adapter_rank: int = 8
    adapter_learning_rate: float = 1e-2
    page_tokens: int = 2_000  # of each domain, on the page about the routing
    replay: float = 0.5  # share of the old domains' rows while the adapter learns the new domain
    # steps follow from the minutes by these rates, never from the clock: same arguments, same numbers
    base_tokens_per_minute: int = 180_000
    adapter_tokens_per_minute: int = 80_000

    def steps(self, tokens_per_minute: int) -> int:
        return max(4, round(self.minutes * tokens_per_minute / (self.rows_per_step * self.row_length)))


def main(recipe: Quickstart) -> dict[str, Any]:
    """Run the recipe, or continue where an interrupted run stopped; returns what `report.json` holds.

    Raises:
        RunRefusedError, DataError: Before any work, if an argument, a file or the output folder cannot be used.
    """
    check(recipe)
    own = read_domains(recipe.data, train_bytes=recipe.train_bytes, held_out_bytes=recipe.held_out_bytes)
    new_domain = choose_new_domain(recipe, own)
    with ResumableRun(recipe.output, "quickstart", identity(recipe, new_domain)) as run, one_thread(), quiet():
        # 1. real text, a tokenizer, and a base model from scratch: neither ever sees the new domain
        domains = load_text(recipe, own, run)
        print_step(
            f"1/5 Training a tokenizer and a base model on {', '.join(name for name in domains if name != new_domain)}"
        )
        text = run.stage("tokenizer", lambda: make_tokenizer(recipe, domains, new_domain), leaves=("tokenizer",))
        base = run.stage("base", lambda: train_base(recipe, domains, new_domain), leaves=("model",))
        # 2. adapters on the experts learn the new domain; the router is frozen, and checked by hash
        print_step(f"2/5 Adapting the experts to {new_domain}, with the router frozen")
        adapter = run.stage("adapter", lambda: train_adapter(recipe, domains, new_domain), leaves=("adapter",))
        # 3. measure before, after, and with the adapter off
        print_step("3/5 Measuring every domain before, after, and with the adapter off")
        evaluation = run.stage("evaluation", lambda: evaluate(recipe, domains), leaves=("routing.html",))
        # 4. load everything back from disk, compare, and write a sample
        print_step("4/5 Loading back and writing a sample")
        loaded = run.stage("load back", lambda: load_back(recipe, domains, new_domain))
        # 5. report, model card, plots
        print_step("5/5 Writing the report, the model card and the plots")
        parts = {"text": text, "base": base, "adapter": adapter, "evaluation": dict(evaluation), "load_back": loaded}
        parts["health"] = parts["evaluation"].pop("health")
        report = describe(recipe, new_domain) | parts | {"seconds": run.seconds, "interrupted": run.interrupted}
        write_results(recipe.output, report)
    summarise(report, recipe.output)
    return report


# ---- before any work: what cannot be used is refused


def check(recipe: Quickstart) -> None:
    if not 0.05 <= recipe.minutes <= 1440:  # also false for NaN
        raise RunRefusedError(
            f"--minutes must be from 0.05 to 1440 (a day), got {recipe.minutes}; {Quickstart.minutes:g} is usual."
        )
    if not 0 <= recipe.seed < 2**32:
        raise RunRefusedError(
            f"--seed must be from 0 to {2**32 - 1}, got {recipe.seed}. Choose a number in that range."
        )


def choose_new_domain(recipe: Quickstart, own: Mapping[str, Domain]) -> str:
    """The domain that the base model does not see."""
    if both := sorted(set(own) & set(EMBEDDED)):
        raise RunRefusedError(
            f"the domain {both[0]!r} in --data is also an embedded one. Rename the file or the field 'domain'."
        )
    known = [*own, *EMBEDDED]
    new = recipe.domain if recipe.domain is not None else next(iter(own), recipe.default_domain)
    if new not in known:
        near = get_close_matches(new, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RunRefusedError(f"--domain must be one of {', '.join(known)}, got {new!r}.{hint}")
    return new


def identity(recipe: Quickstart, new_domain: str) -> dict[str, Any]:
    """What two calls must share for the second to continue the first; file names, as no path goes into a result."""
    choices = asdict(recipe) | {"data": [path.name for path in recipe.data], "domain": new_domain}
    del choices["output"]
    return choices | {"versions": {name: version(name) for name in LIBRARIES}}


def load_text(recipe: Quickstart, own: Mapping[str, Domain], run: ResumableRun) -> dict[str, Domain]:
    """All domains; refuses to continue a run whose text has changed since."""
    embedded = embedded_corpus(train_bytes=recipe.train_bytes, held_out_bytes=recipe.held_out_bytes)
    domains = {**own, **embedded}
    now = {name: domain.sha256() for name, domain in domains.items()}
    then = run.stage("text", lambda: now)
    if changed := [name for name in now if then.get(name) != now[name]]:
        raise RunRefusedError(
            f"the text of the domain {changed[0]!r} has changed since this run began (a file was edited, or a package "
            "installed). Choose another --output to start over."
        )
    return domains


# ---- 1. tokenizer and base model


def make_tokenizer(recipe: Quickstart, domains: Mapping[str, Domain], new_domain: str) -> dict[str, Any]:
    seen = [text for name, domain in domains.items() if name != new_domain for text in domain.train]
    tokenizer = train_tokenizer(seen, vocab_size=recipe.vocab_size, max_length=recipe.row_length)
    with whole_folder(recipe.output / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
    return {name: count_text(tokenizer, domain) for name, domain in domains.items()}


def train_base(recipe: Quickstart, domains: Mapping[str, Domain], new_domain: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(recipe)
    rows = training_rows(recipe, tokenizer, domains)
    old = [name for name in rows if name != new_domain]
    steps = recipe.steps(recipe.base_tokens_per_minute)
    mixture = mix(rows, {name: 1 / len(old) for name in old}, count=steps * recipe.rows_per_step, seed=recipe.seed)
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(model_config(recipe, tokenizer), experts_implementation="hf_moe")
    log = train(recipe, "base", model, mixture, learning_rate=recipe.learning_rate)
    with whole_folder(recipe.output / "model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    keep_logits(recipe, "base", model, probe_rows(recipe, tokenizer, domains))
    size = explain(model)
    return {
        "steps": steps,
        "tokens": mixture.numel(),
        "parameters": {"total": size.total_parameters, "active": size.active_parameters},
        "experts": list(size.choices),
        "router_sha256": router_hash(model),
        "log": log,
    }


def model_config(recipe: Quickstart, tokenizer: PreTrainedTokenizerFast) -> HfMoeConfig:
    return HfMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        moe_intermediate_size=recipe.expert_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        num_shared_experts=1,
        max_position_embeddings=recipe.row_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(
    recipe: Quickstart,
    name: str,
    model: PreTrainedModel | PeftModel,
    rows: Tensor,
    *,
    learning_rate: float,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> list[dict[str, float]]:
    """The ordinary Trainer, once over the rows, from the newest complete checkpoint on; returns its training log."""
    steps = len(rows) // recipe.rows_per_step
    log_every = max(1, steps // 20)
    arguments = TrainingArguments(
        output_dir=str(recipe.output / "work" / name),
        max_steps=steps,
        per_device_train_batch_size=recipe.rows_per_step,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=1 + steps // 20,
        weight_decay=0.05,
        adam_beta2=0.95,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        save_steps=2 * log_every,
        save_total_limit=2,
        train_sampling_strategy="sequential",  # `mix` has put the rows in order
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=recipe.seed,
        report_to="none",
    )
    trainer = MoeTrainer(
        model=model,
        args=arguments,
        train_dataset=PackedRows(rows),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(BalanceProgress)
    trainer.train(resume_from_checkpoint="auto")
    return [record for record in trainer.state.log_history if "loss" in record]


# ---- 2. adapter


def train_adapter(recipe: Quickstart, domains: Mapping[str, Domain], new_domain: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(recipe)
    rows = training_rows(recipe, tokenizer, domains)
    old = [name for name in rows if name != new_domain]
    steps = recipe.steps(recipe.adapter_tokens_per_minute)
    shares = {new_domain: 1 - recipe.replay} | {name: recipe.replay / len(old) for name in old}
    mixture = mix(rows, shares, count=steps * recipe.rows_per_step, seed=recipe.seed + 1)

    model = load_model(recipe)
    # a frozen router needs no balancing, whose gradient would only push the adapters around
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    hash_before = freeze_router(model)
    set_seed(recipe.seed)
    tuned = get_peft_model(model, expert_lora_config(model, r=recipe.adapter_rank))
    accelerate_adapters(tuned)
    log = train(
        recipe,
        "adapter",
        tuned,
        mixture,
        learning_rate=recipe.adapter_learning_rate,
        callbacks=(RouterFreezeCallback(),),
    )
    hash_after = verify_router_frozen(tuned, hash_before)
    tuned.peft_config["default"].base_model_name_or_path = "../model"  # no path of this machine
    with whole_folder(recipe.output / "adapter") as folder:
        tuned.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()  # PEFT's empty card; ours is one level up
        verify_adapter_without_router(folder, tuned)
    keep_logits(recipe, "adapter", tuned, probe_rows(recipe, tokenizer, domains))
    return {
        "steps": steps,
        "tokens": mixture.numel(),
        "trainable_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "router_sha256_before": hash_before,
        "router_sha256_after": hash_after,
        "log": log,
    }


# ---- 3. evaluation


def evaluate(recipe: Quickstart, domains: Mapping[str, Domain]) -> dict[str, Any]:
    tokenizer = load_tokenizer(recipe)
    probes = {name: held_out_rows(recipe, tokenizer, domain) for name, domain in domains.items()}
    base = load_model(recipe)
    before = measure(recipe, base, tokenizer, domains)
    choices_before, trace_before = record(base, probes)
    tuned = with_adapter(recipe, base)
    after = measure(recipe, tuned, tokenizer, domains)
    choices_after, trace_after = record(tuned, probes)
    write_routing_page(recipe, tuned, tokenizer, domains)
    with tuned.disable_adapter():
        off = measure(recipe, tuned, tokenizer, domains)
    if off != before:
        raise RuntimeError(f"with the adapter off the model must be the base model: {off} differs from {before}.")
    return {
        "bits_per_byte": {"before": before, "after": after, "adapter off": off},
        "routing_agreement": {name: routing_agreement(choices_before[name], choices_after[name]) for name in domains},
        "probe_tokens": {name: rows.numel() for name, rows in probes.items()},
        "expert_load_before": load_by_domain(trace_before),
        "expert_load_after": load_by_domain(trace_after),
        "balance_before": balance(trace_before),
        "health": {"before": str(trace_before.health()), "after": str(trace_after.health())},
    }


def measure(
    recipe: Quickstart,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    domains: Mapping[str, Domain],
) -> dict[str, float]:
    """Bits per byte of the held-out text of each domain."""
    window, stride = recipe.row_length, recipe.row_length // 2
    return {
        name: bits_per_byte(model, tokenizer, domain.held_out, window=window, stride=stride).value
        for name, domain in domains.items()
    }


def record(
    model: PreTrainedModel | PeftModel, probes: Mapping[str, Tensor]
) -> tuple[dict[str, RoutingChoices], RoutingTrace]:
    """The experts chosen for each probe token, by domain, and how the tokens spread over the experts."""
    choices = {}
    with record_routing(model) as trace:
        for name, rows in probes.items():
            with trace.domain(name):
                choices[name] = record_choices(model, rows)
    return choices, trace


def load_by_domain(trace: RoutingTrace) -> dict[str, list[list[int]]]:
    """By domain, for each layer the tokens that each expert got."""
    return {
        domain: [trace.statistics(layer, domain).counts.tolist() for layer in trace.layers] for domain in trace.domains
    }


def balance(trace: RoutingTrace) -> dict[str, list[float]]:
    """Per layer, over all domains together."""
    layers = [trace.statistics(layer) for layer in trace.layers]
    return {
        "load_entropy": [layer.load_entropy for layer in layers],
        "max_violation": [layer.max_violation for layer in layers],
    }


def write_routing_page(
    recipe: Quickstart, model: PeftModel, tokenizer: PreTrainedTokenizerFast, domains: Mapping[str, Domain]
) -> None:
    """Which expert took which token of held-out text."""
    texts = {name: domain.held_out for name, domain in domains.items()}
    trace = trace_texts(model, tokenizer, texts, detail="tokens", max_tokens=recipe.page_tokens)
    trace.report(recipe.output / "routing.html", title="hf_moe quickstart")


# ---- 4. load back


def load_back(recipe: Quickstart, domains: Mapping[str, Domain], new_domain: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(recipe.output / "model")
    rows = probe_rows(recipe, tokenizer, domains)
    model = load_model(recipe)
    compare_logits(recipe, "base", model, rows)
    tuned = with_adapter(recipe, model)
    compare_logits(recipe, "adapter", tuned, rows)
    prompt = tokenizer.decode(
        encode_documents(tokenizer, domains[new_domain].held_out[:1])[0][: recipe.row_length // 8]
    )
    with tuned.disable_adapter():
        base_sample = sample(recipe, tuned, tokenizer, prompt)
    return {
        "logits_equal": True,
        "router_sha256": router_hash(tuned),
        "sample": {"prompt": prompt, "base": base_sample, "adapted": sample(recipe, tuned, tokenizer, prompt)},
    }


def compare_logits(recipe: Quickstart, name: str, model: PreTrainedModel | PeftModel, rows: Tensor) -> None:
    trained = load_file(recipe.output / "work" / f"{name}_logits.safetensors")["logits"]
    loaded = logits_of(model, rows)
    if not torch.equal(loaded, trained):
        difference = (loaded - trained).abs().max().item()
        raise RuntimeError(f"the {name} model loaded from disk differs from the trained one by up to {difference}.")


def sample(
    recipe: Quickstart, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> str:
    set_seed(recipe.seed)
    inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
    room = recipe.row_length - inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(80, room),
        do_sample=True,
        temperature=0.7,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- 5. results


def describe(recipe: Quickstart, new_domain: str) -> dict[str, Any]:
    choices = identity(recipe, new_domain)
    versions = choices.pop("versions") | {"python": platform.python_version()}
    command = f"hf-moe quickstart --domain {new_domain} --minutes {recipe.minutes:g} --seed {recipe.seed}"
    for name in choices["data"]:
        command += f" --data {name}"
    return {
        "recipe": "quickstart",
        "date": date.today().isoformat(),
        "command": command,
        "new_domain": new_domain,
        "choices": choices,
        "versions": versions,
        "machine": {"architecture": platform.machine(), "torch_threads": 1, "device": "cpu"},
    }


def write_results(output: Path, report: dict[str, Any]) -> None:
    evaluation = report["evaluation"]
    with whole_folder(output / "plots") as folder:
        new = report["new_domain"]
        plot_loss(
            folder / "loss.png",
            {"Base model": report["base"]["log"], f"Adapter for {new}": report["adapter"]["log"]},
        )
        plot_bits_per_byte(folder / "bits_per_byte.png", evaluation["bits_per_byte"], new_domain=new)
        loads = {name: [torch.tensor(c) for c in load] for name, load in evaluation["expert_load_before"].items()}
        plot_expert_load(folder / "expert_load.png", loads)
    write_text(output / "README.md", quickstart_card(report, output))
    write_json(output / "report.json", report)
    shutil.rmtree(output / "work", ignore_errors=True)


def summarise(report: Mapping[str, Any], output: Path) -> None:
    """A table of what happened, and where to look."""
    evaluation, new = report["evaluation"], report["new_domain"]
    table = Table(title="Bits per byte of held-out text (lower is better)", title_justify="left")
    table.add_column("domain")
    for column in ("before", "after", "change", "adapter off", "same experts chosen"):
        table.add_column(column, justify="right")
    values = evaluation["bits_per_byte"]
    for name in values["before"]:
        before, after, off = (values[key][name] for key in ("before", "after", "adapter off"))
        agreement = evaluation["routing_agreement"][name]
        same = f"{min(agreement):.0%} to {max(agreement):.0%}"
        style = "bold" if name == new else None
        label = f"{name} (new)" if name == new else name
        table.add_row(
            label, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}", f"{off:.3f}", same, style=style
        )
    console = Console()
    console.print(table)
    console.print(
        f"Router frozen: sha256 {report['adapter']['router_sha256_after'][:12]} before and after. "
        "Adapter off: exactly the base model. Loaded back: logits equal.",
        *report["base"]["experts"],
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    for name, what in RESULTS.items():
        console.print(f"  {output / name}  {what}", highlight=False, soft_wrap=True)


RESULTS = {
    "README.md": "model card with these numbers and the plots",
    "report.json": "all numbers",
    "routing.html": "which expert took which token: open it in a browser",
    "model": "AutoModelForCausalLM.from_pretrained",
    "adapter": "PeftModel.from_pretrained",
}


# ---- what several steps use


def print_step(text: str) -> None:
    Console().print(text, style="bold", highlight=False)


def load_tokenizer(recipe: Quickstart) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(recipe.output / "tokenizer")


def load_model(recipe: Quickstart) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(recipe.output / "model", experts_implementation="hf_moe")
    for parameter in model.parameters():
        # loaded weights lie in the file's memory at any address, on which the last bit of a product may depend
        parameter.data = parameter.data.clone()
    return model


def with_adapter(recipe: Quickstart, model: PreTrainedModel) -> PeftModel:
    tuned = PeftModel.from_pretrained(model, recipe.output / "adapter")
    accelerate_adapters(tuned)
    return tuned


def count_text(tokenizer: PreTrainedTokenizerFast, domain: Domain) -> dict[str, int]:
    return {
        "train_documents": len(domain.train),
        "train_bytes": domain.train_bytes,
        "train_tokens": sum(map(len, encode_documents(tokenizer, domain.train))),
        "held_out_documents": len(domain.held_out),
        "held_out_bytes": domain.held_out_bytes,
        "held_out_tokens": sum(map(len, encode_documents(tokenizer, domain.held_out))),
    }


def training_rows(
    recipe: Quickstart, tokenizer: PreTrainedTokenizerFast, domains: Mapping[str, Domain]
) -> dict[str, Tensor]:
    return {
        name: pack(
            encode_documents(tokenizer, domain.train),
            row_length=recipe.row_length,
            end_of_text=tokenizer.eos_token_id,
        )
        for name, domain in domains.items()
    }


def held_out_rows(recipe: Quickstart, tokenizer: PreTrainedTokenizerFast, domain: Domain) -> Tensor:
    """Up to 16 rows of held-out text, without padding."""
    documents = encode_documents(tokenizer, domain.held_out)
    return pack(documents, row_length=recipe.row_length, end_of_text=tokenizer.eos_token_id)[:16]


def probe_rows(recipe: Quickstart, tokenizer: PreTrainedTokenizerFast, domains: Mapping[str, Domain]) -> Tensor:
    """One held-out row of each domain."""
    return torch.cat([held_out_rows(recipe, tokenizer, domain)[:1] for domain in domains.values()])


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, rows: Tensor) -> Tensor:
    model.eval()
    return model(input_ids=rows.long(), use_cache=False).logits


def keep_logits(recipe: Quickstart, name: str, model: PreTrainedModel | PeftModel, rows: Tensor) -> None:
    """Keep the logits of the trained model, to compare with what is loaded back."""
    save_file({"logits": logits_of(model, rows).contiguous()}, recipe.output / "work" / f"{name}_logits.safetensors")


if __name__ == "__main__":
    # every field of Quickstart is an option here: python recipes/quickstart.py --experts 32 --seed 1
    parser = HfArgumentParser(Quickstart)
    (chosen,) = parser.parse_args_into_dataclasses()
    try:
        main(chosen)
    except (RunRefusedError, DataError) as error:
        parser.exit(2, f"error: {error}\n")
