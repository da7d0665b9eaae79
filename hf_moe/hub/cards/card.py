"""Write model cards from facts: configs, the report of a run, an evaluation's results, a routing trace.

The template is ours and is rendered in Jinja's sandbox; values are put in once and never rendered themselves, so that
neither a template nor an instruction inside a value is carried out. A card holds nothing that no file tells.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_moe.hub.cards.benchmarks import eval_files, eval_refusals
from hf_moe.hub.cards.beside import RESULTS_FORMAT, keep_richer_card
from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts, checkpoint_facts
from hf_moe.hub.cards.emissions_facts import Emissions, emissions_facts
from hf_moe.hub.cards.facts import CardError, read_facts
from hf_moe.hub.cards.markdown import cell, plain
from hf_moe.hub.cards.metadata import CardChoices, card_data, is_repo
from hf_moe.hub.cards.routing_facts import RoutingFacts, routing_facts
from hf_moe.hub.cards.same_model import refuse_other_results, refuse_other_trace, refuse_other_training
from hf_moe.hub.cards.sections import about, summary
from hf_moe.hub.cards.sections.evaluation import evaluation_section
from hf_moe.hub.cards.sections.loading import loading
from hf_moe.hub.cards.sections.routing import routing_section
from hf_moe.hub.cards.sections.samples import samples_section
from hf_moe.hub.cards.sections.training import data_section, training_section
from hf_moe.hub.cards.training_facts import TrainingFacts, training_facts
from hf_moe.hub.scrub import scrub
from hf_moe.io.installation import install_command

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

logger = logging.getLogger(__name__)

Facts = str | Path | Mapping[str, Any]


def model_card(
    model: str | Path,
    *,
    results: Facts | None = None,
    trace: str | Path | None = None,
    training: Facts | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | None = None,
    datasets: Sequence[str] = (),
    plots: Sequence[str] = (),
) -> "ModelCard":
    """Build the card of a saved model or adapter.

    Args:
        model: Folder that `save_pretrained` wrote.
        results: `results.json` of `hf-moe evaluate`, or what it holds.
        trace: The folder that `hf-moe trace` wrote or the `metrics.json` in it, or a saved `RoutingTrace`.
        training: `report.json` of a recipe, or `trainer_state.json` of a Trainer, or what it holds. The energy is
            read from codecarbon's `emissions.csv` if that lies beside it or in `model`.
        repo_id: Name on the Hub, for the code that loads it; default: the folder's name.
        base_model: Name on the Hub of the model that it was made from; default: what the adapter's config says.
        license: Identifier of the Hub, such as `apache-2.0`.
        language: Code such as `en`.
        datasets: Names on the Hub of the training data.
        plots: Images that lie beside the card: those that it knows (`plots/loss.png`, `plots/expert_load.png`,
            `plots/bits_per_byte.png`) are embedded.

    Returns:
        `huggingface_hub.ModelCard`; `str()` is the text, `.data` the metadata.

    Raises:
        CardError: If a file of facts is missing, damaged, something else, or of another model, or a name or
            identifier is none that the Hub takes.
        ImportError: If jinja2 is not installed.
    """
    choices = CardChoices(repo_id, base_model, license, language, datasets).checked()
    return card_from_facts(*_read_facts(model, results, trace, training), choices, plots=plots)


def card_from_facts(
    checkpoint: CheckpointFacts,
    training: TrainingFacts,
    results: Mapping[str, Any] | None = None,
    routing: RoutingFacts | None = None,
    choices: CardChoices | None = None,
    *,
    title: str | None = None,
    plots: Sequence[str] = (),
) -> "ModelCard":
    """Build the card of `model_card` from facts that are at hand. The choices are not checked."""
    from huggingface_hub import ModelCard

    results, routing, choices = results or {}, routing or RoutingFacts(), choices or CardChoices()
    name, base = choices.repo_id or checkpoint.name, _base(checkpoint, training, choices.base_model)
    # before markup escapes their slashes
    title = scrub(plain(title or summary.title(checkpoint, training, name, base)))
    name = scrub(plain(name))
    total = checkpoint.total or training.total
    parts = {
        "Load it": loading(checkpoint, training, name, base),
        "What it is": about.facts(checkpoint, training, base, choices.license),
        "Samples": samples_section(training, total),
        "Evaluation": evaluation_section(results, training, plots),
        "Routing": routing_section(routing, training, plots),
        "Training": training_section(training, plots),
        "Data": data_section(training),
        "Limits": about.limits(results, training, total),
        "Citation": about.citation(title, name, training.date),
        "Made with": about.made_with(training, results),
    }
    head = card_data(
        checkpoint,
        results,
        replace(choices, repo_id=name, base_model=base),
        emissions=training.emissions,
        training_type=_training_type(checkpoint, training, base),
    )
    text = _render(head.to_yaml(), cell(title), summary.summary(checkpoint, training, base), parts)
    return ModelCard(scrub(text))


def write_card(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    results: Facts | None = None,
    trace: str | Path | None = None,
    training: Facts | None = None,
    **choices: Any,
) -> list[Path]:
    """Write `README.md`, its plots, and `.eval_results/` for full runs of benchmarks; returns what was written.

    A card that says more than the new one is kept as `README.old.md`, with a warning.

    Args:
        folder: As `model` of `model_card`.
        output: Folder for the card; default: `folder`.
        choices: Further arguments of `model_card`; `plots` are drawn from the facts.

    Raises:
        CardError: As `model_card`; nothing is written then.
        ImportError: If jinja2, or for plots matplotlib, is not installed.
    """
    from hf_moe.hub.cards.plots import draw_plots
    from hf_moe.io.whole_files import write_text

    chosen = CardChoices(**choices).checked()
    checkpoint, trained, evaluated, routing = _read_facts(folder, results, trace, training)
    target = Path(folder if output is None else output)
    drawn = draw_plots(target, _training(training), trace, is_adapter=checkpoint.is_adapter)
    plots = [f"plots/{path.name}" for path in drawn]
    card = card_from_facts(checkpoint, trained, evaluated, routing, chosen, plots=plots)
    files = {"README.md": str(card), **eval_files(evaluated)}
    keep_richer_card(target / "README.md", str(card))
    for name, reason in eval_refusals(evaluated).items():
        logger.warning("%s gets no file in .eval_results: %s.", name, reason)
    for name, text in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(target / name, text)
    return [*(target / name for name in files), *drawn]


def _read_facts(
    model: str | Path, results: Facts | None, trace: str | Path | None, training: Facts | None
) -> tuple[CheckpointFacts, TrainingFacts, dict[str, Any], RoutingFacts]:
    """Read everything that is given; refuse facts of another model."""
    checkpoint = checkpoint_facts(Path(model))
    trained = training_facts(_training(training), is_adapter=checkpoint.is_adapter)
    refuse_other_training(checkpoint, trained)
    evaluated = _results(results)
    refuse_other_results(checkpoint, evaluated)
    routing = RoutingFacts() if trace is None else routing_facts(Path(trace))
    refuse_other_trace(checkpoint, routing)
    return checkpoint, replace(trained, emissions=_emissions(Path(model), training)), evaluated, routing


def _results(given: Facts | None) -> dict[str, Any]:
    """Results of `hf-moe evaluate`, or nothing."""
    results = {} if given is None else _read(given)
    if given is not None and not str(results.get("format")).startswith(RESULTS_FORMAT):
        raise CardError(f"{_name(given, 'results')} is no results.json of hf-moe evaluate. Give the one it wrote.")
    return results


def _training(given: Facts | None) -> dict[str, Any]:
    """A report that `training_facts` knows, or nothing."""
    report = {} if given is None else _read(given)
    if given is not None and not {"recipe", "log_history"} & report.keys():
        raise CardError(
            f"{_name(given, 'training')} is neither the report.json of a recipe nor the trainer_state.json of a "
            "Trainer. Give one of them."
        )
    return report


def _read(facts: Facts) -> dict[str, Any]:
    return dict(facts) if isinstance(facts, Mapping) else read_facts(Path(facts))


def _name(given: Facts, what: str) -> str:
    return what if isinstance(given, Mapping) else repr(str(given))


def _emissions(model: Path, training: Facts | None) -> Emissions | None:
    """codecarbon's estimate beside the training report, above the checkpoint that it lies in, or beside the model."""
    report = model if training is None or isinstance(training, Mapping) else Path(training).parent
    above = [report.parent] if report.name.startswith("checkpoint-") else []
    found = (emissions_facts(folder) for folder in (report, *above, model))
    return next((each for each in found if each is not None), None)


def _base(checkpoint: CheckpointFacts, training: TrainingFacts, chosen: str | None) -> str | None:
    """The base model's name on the Hub, or the last part of its path."""
    base = chosen or checkpoint.base_model or training.base_model
    is_local = chosen is None and checkpoint.base_is_local
    return base if base is None or (is_repo(base) and not is_local) else Path(plain(base)).name


def _training_type(checkpoint: CheckpointFacts, training: TrainingFacts, base: str | None) -> str | None:
    """Kind of training in the Hub's words; None where it is not known."""
    if checkpoint.is_adapter or base is not None:
        return "fine-tuning"
    return "pre-training" if training.is_from_scratch else None


def _render(card_yaml: str, title: str, summary: str, parts: Mapping[str, str]) -> str:
    try:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(f"model cards need jinja2. Install it with: {install_command('recipes')}") from error
    # Markdown, not HTML: `cell`, `fenced` and `plain` escape what comes from data; values are not rendered again
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    source = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    filled = {name: text for name, text in parts.items() if text}
    return environment.from_string(source).render(card_data=card_yaml, title=title, summary=summary, sections=filled)
