"""Hand-made routing for the report's tests: random choices, and the statistics counted from them with numpy."""

import numpy as np
import torch

from hf_moe.observability.layer_statistics import LayerStatistics
from hf_moe.observability.report.data import ReportData, TokenSample


def random_choices(tokens, experts, top_k, generator):
    """Different experts per token, `[N, K]`, with weights that fall and add up to 1."""
    noise = generator.random((tokens, experts)) + np.linspace(0, 0.6, experts)
    chosen = np.argsort(-noise, axis=1)[:, :top_k]
    weights = np.sort(generator.random((tokens, top_k)), axis=1)[:, ::-1] + 0.1
    return chosen, weights / weights.sum(1, keepdims=True)


def count_statistics(name, experts, chosen, weights, *, pairs=True):
    one_hot = np.zeros((len(chosen), experts))
    np.put_along_axis(one_hot, chosen, 1, axis=1)
    mass = np.zeros(experts)
    np.add.at(mass, chosen.ravel(), weights.ravel())
    return LayerStatistics(
        name=name,
        num_experts=experts,
        top_k=chosen.shape[1],
        tokens=len(chosen),
        counts=torch.from_numpy(one_hot.sum(0).astype(np.int64)),
        weight_mass=torch.from_numpy(mass),
        dropped=0,
        scored_tokens=len(chosen),
        entropy_sum=0.5 * len(chosen) * np.log(experts),
        margin_sum=0.2 * len(chosen),
        coactivation=torch.from_numpy((one_hot.T @ one_hot).astype(np.int64)) if pairs else None,
    )


def sample_report(
    *,
    experts=(8, 8, 8),
    top_k=2,
    tokens=600,
    domains=("english", "law", "code"),
    pieces=(" word", " another", "\n"),
    title="tiny/model",
    name="model.layers.{}.mlp",
    pairs=True,
    with_tokens=True,
    seed=0,
):
    """Random routing with `len(experts)` layers; the domains are equal parts of the tokens."""
    generator = np.random.default_rng(seed)
    of_domain = np.arange(tokens) * max(len(domains), 1) // max(tokens, 1)
    choices = [random_choices(tokens, size, top_k, generator) for size in experts]
    names = [name.format(position) for position in range(len(experts))]

    def statistics(where):
        return tuple(
            count_statistics(names[i], experts[i], chosen[where], weights[where], pairs=pairs)
            for i, (chosen, weights) in enumerate(choices)
        )

    return ReportData(
        title=title,
        layers=statistics(slice(None)),
        facts={"Model": title},
        by_domain={domain: statistics(of_domain == place) for place, domain in enumerate(domains)},
        tokens=TokenSample(
            texts=np.arange(tokens) // 100,
            domains=of_domain if domains else np.full(tokens, -1),
            positions=np.arange(tokens) % 100,
            pieces=[pieces[i % len(pieces)] for i in range(tokens)],
            token_ids=np.arange(tokens),
            experts=tuple(chosen for chosen, _ in choices),
            weights=tuple(weights for _, weights in choices),
            total=tokens,
        )
        if with_tokens
        else None,
    )
