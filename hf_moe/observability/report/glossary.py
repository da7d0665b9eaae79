"""What every metric of routing means and which values are good: one table for pages, terminal, cards and documents.

The good values are rules of thumb for a model that was trained with balancing. The verdict of `diagnose` does not use
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_moe.observability.health import rarely_chosen
from hf_moe.observability.layer_statistics import LayerStatistics
from hf_moe.observability.report import text


@dataclass(frozen=True)
class Term:
    """A metric, as a column's head.

    Attributes:
        title: The column's head.
        meaning: What it is, and where its scale begins and ends.
        good: Values that are good, such as "< 0.5"; empty where neither end is.
    """

    title: str
    meaning: str
    good: str = ""


LAYER_TERMS: Mapping[str, Term] = {
    "busiest": Term("Busiest", "Load of the busiest expert over its even share; 1× is balanced.", "< 2×"),
    "dead": Term("Dead", "Experts that no token of this text chose.", "0"),
    "rare": Term(
        "Rare",
        "Experts that are rarely chosen: by some tokens, but for less than an eighth of their even share. No fault by "
        "itself: they may serve other text.",
        "few",
    ),
    "load_cv": Term(
        "Load CV", "Coefficient of variation of the load: standard deviation over mean; 0 is balanced.", "< 0.5"
    ),
    "load_entropy": Term(
        "Load entropy",
        "Entropy of the load over the experts, scaled: 1 is balanced, 0 is one expert for all.",
        "> 0.9",
    ),
    "router_entropy": Term(
        "Router entropy",
        "Mean entropy of the router's probabilities for one token, scaled: 0 is certain, 1 undecided. Neither end is "
        "good: it falls while a router learns.",
    ),
    "margin": Term(
        "Margin",
        "Mean difference between a token's two largest router probabilities. The larger, the less a small change of "
        "the weights changes the choice.",
    ),
    "empty": Term(
        "Empty",
        "Share of the slots without an expert: null experts, where more than 0% is meant, and assignments dropped "
        "over capacity.",
        "0%",
    ),
    "tokens": Term("Tokens", "Tokens that reached the layer; padding does not count."),
    "experts": Term("Experts", "Experts that the router chooses from; shared and null experts not counted."),
    "top_k": Term("Per token", "Experts chosen for each token (top-k)."),
}

OTHER_TERMS: Mapping[str, Term] = {
    "assignment": Term("Assignment", "One expert chosen for one token: a token makes top-k of them."),
    "load": Term("Load", "Share of a layer's assignments that an expert gets."),
    "even_share": Term("Even share", "Load of every expert if all were chosen equally often: one over their number."),
    "max_violation": Term(
        "Max violation", "How far the busiest expert is above its even share; 0 is balanced (Busiest less 1).", "< 1"
    ),
    "distance": Term(
        "Distance",
        "Jensen-Shannon divergence between a domain's load and the mean of all domains, in bits: 0 is the same "
        "experts, 1 none in common.",
    ),
}

COMPARISON_TERMS: Mapping[str, Term] = {
    "bits": Term("Bits per byte", "What a model needs to write down a byte of the text; lower is better."),
    "agreement": Term("Same experts", "Share of the tokens that go to exactly the same experts in both models."),
    "overlap": Term("Overlap", "Mean share of a token's experts that both models chose."),
    "shift": Term(
        "Load shift", "Jensen-Shannon divergence between the two loads, in bits: 0 is no change, 1 other experts."
    ),
    "noise": Term("Noise", "The load shift that two samples of this size show where nothing has changed."),
    "newly_dead": Term("Newly dead", "Experts that are dead in the new model and were not in the base.", "none"),
    "revived": Term("Revived", "Experts that were dead in the base and are not in the new model."),
    "drift": Term("Change of weights", "Norm of the change over the norm of the base's weights: 0% is unchanged."),
}


def layer_row(layer: LayerStatistics) -> dict[str, str]:
    """The values of `LAYER_TERMS` for one layer, in words; a dash where one is not known."""
    seen = bool(layer.tokens)
    return {
        "experts": text.count(layer.num_experts),
        "top_k": text.count(layer.top_k),
        "tokens": text.short_count(layer.tokens),
        "busiest": text.times(1 + layer.max_violation),
        "dead": text.count(len(layer.dead_experts)) if seen else "–",
        "rare": text.count(len(rarely_chosen(layer))) if seen else "–",
        "load_cv": text.decimal(layer.load_cv),
        "load_entropy": text.decimal(layer.load_entropy),
        "router_entropy": text.decimal(layer.router_entropy),
        "margin": text.decimal(layer.margin),
        "empty": text.percent(layer.empty_share),
    }


def glossary() -> str:
    """All terms as a Markdown table, for the documents."""
    rows = [
        f"| {term.title} | {term.meaning} | {term.good or '–'} |"
        for terms in (LAYER_TERMS, OTHER_TERMS, COMPARISON_TERMS)
        for term in terms.values()
    ]
    return "\n".join(["| term | meaning | good |", "|---|---|---|", *rows, ""])
