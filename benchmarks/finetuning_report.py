"""What `finetuning.py` measured, as a plot and as a page of tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {
    "attention LoRA": "#9a6fb0", "expert LoRA": "#2f6db5", "adapter experts": "#e07b28", "ESFT": "#5a9e6f",
    "full": "#555555",
}  # fmt: skip
INTRO = """# Ways of fine-tuning, compared

The quickstart's base ({parameters} parameters, 16 experts, top-2) learns one new domain at a time, by each method, in
{steps} steps of {tokens:,} tokens. The router is frozen in all, and {proof}.
The metric is bits per byte of held-out text, lower is better: of the new domain, and of the four that the base was
trained on ({old}). One run and one seed each: no error bars. With replay, half of the rows
come from the old domains. Seconds are CPU time of one thread. Full fine-tuning alone trains the embeddings, and a
language that the base has never seen needs these most. All numbers are in
[`finetuning.json`](../../benchmarks/results/finetuning.json).

The command, after `hf-moe quickstart`:
`python benchmarks/finetuning.py --base quickstart-output/model --texts FOLDER --cards model_cards/finetuning`, then
`python benchmarks/finetuning.py --report`, which wrote this page. Weights are not kept; the cards of three of the runs
lie beside it: {cards}.
"""


class Runs:
    """The runs at each method's own learning rate, by domain and method."""

    def __init__(self, result: Mapping[str, Any], rates: Mapping[str, float]):
        self.result, self.rates = result, rates
        self.methods = list(rates)
        self.domains = [name for name, runs in result["runs"].items() if all(self._key(m) in runs for m in rates)]
        first = self.of(self.domains[0], self.methods[0])["domains"]
        self.old = [name for name in first if name != self.domains[0]]

    def _key(self, method: str) -> str:
        return f"{method} at {self.rates[method]:g}"

    def of(self, domain: str, method: str) -> Mapping[str, Any]:
        return self.result["runs"][domain][self._key(method)]

    def learned(self, domain: str, method: str) -> float:
        return change(self.of(domain, method), domain)

    def forgotten(self, domain: str, method: str) -> float:
        return mean(change(self.of(domain, method), old) for old in self.old)

    def mean(self, method: str, value: str) -> float:
        return mean(getattr(self, value)(domain, method) for domain in self.domains)

    def agreement(self, domain: str, method: str) -> float:
        """On the old domains, of the layer with the least."""
        return mean(self.of(domain, method)["domains"][old]["routing_agreement"] for old in self.old)

    @property
    def frozen(self) -> bool:
        return all(self.of(domain, method)["router_unchanged"] for domain in self.domains for method in self.methods)

    def seconds(self, domain: str, method: str) -> float:
        return self.of(domain, method)["cpu_seconds_per_step"]


def change(run: Mapping[str, Any], domain: str) -> float:
    return run["domains"][domain]["after"] - run["domains"][domain]["before"]


def write_report(result: Mapping[str, Any], rates: Mapping[str, float], plot: Path, page: Path) -> None:
    """Raises ValueError if no domain has a run of each method."""
    runs = Runs(result, rates)
    draw(runs, plot)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(runs, page), encoding="utf-8")


def render(runs: Runs, page: Path) -> str:
    settings = runs.result["settings"]
    cards = sorted(path.parent.name for path in page.parent.glob("*/README.md"))
    intro = INTRO.format(
        proof="its SHA-256 was the same before and after each run" if runs.frozen else "IN SOME RUNS IT CHANGED",
        parameters="3.9M", steps=settings["steps"], tokens=settings["rows_per_step"] * settings["row_length"],
        old=", ".join(runs.old), cards=", ".join(f"[{name}]({name}/README.md)" for name in cards) or "none",
    )  # fmt: skip
    parts = [
        intro,
        "![Learned against forgotten, by method](../../benchmarks/results/plots/finetuning.png)\n",
        f"## Means over the new domains ({', '.join(runs.domains)})\n",
        summary(runs),
        *unfinished(runs),
        "## The new domain\n\nChange in bits per byte; the first row is the base.\n",
        by_domain(runs, "learned"),
        "## The old domains\n\nMean change in bits per byte over the four, after learning the domain of the column.\n",
        by_domain(runs, "forgotten"),
        "## Learning rates\n\nThe rates are those of the recipes' configs; one about three times as high was tried "
        "beside each. Change in bits per byte of the new domain, and of the old ones.\n",
        rates_table(runs),
        "## Texts\n\nCut between paragraphs into pieces of about 1,200 bytes; the held-out ones lie evenly spread. "
        "The base has trained on none of the held-out text.\n",
        texts_table(runs),
        f"Versions: {', '.join(f'{name} {value}' for name, value in settings['versions'].items())}; "
        f"{settings['device']}; seed {settings['seed']}.\n",
    ]
    return "\n".join(parts)


def unfinished(runs: Runs) -> list[str]:
    names = [name for name in runs.result["runs"] if name not in runs.domains]
    return [f"Begun, and left out here until every method has run: {', '.join(names)}.\n"] if names else []


def summary(runs: Runs) -> str:
    rows = [summary_row(runs, method) for method in runs.methods]
    head = ["", "trained", "saved", "s/step", "new domain", "old domains", "same experts chosen (old)"]
    return markdown(head, rows)


def summary_row(runs: Runs, method: str) -> list[str]:
    each = [runs.of(domain, method) for domain in runs.domains]
    return [
        method,
        f"{round(mean(run['trained'] for run in each)):,}",
        f"{each[0]['saved_bytes'] / 1e6:.1f} MB",
        f"{runs.mean(method, 'seconds'):.2f}",
        f"{runs.mean(method, 'learned'):+.2f}",
        f"{runs.mean(method, 'forgotten'):+.2f}",
        f"{runs.mean(method, 'agreement'):.0%}",
    ]


def by_domain(runs: Runs, value: str) -> str:
    rows = []
    if value == "learned":
        base = [runs.of(domain, runs.methods[0])["domains"][domain]["before"] for domain in runs.domains]
        rows.append(["before", *(f"{each:.2f}" for each in base)])
    for method in runs.methods:
        rows.append([method, *(f"{getattr(runs, value)(domain, method):+.2f}" for domain in runs.domains)])
    return markdown(["", *runs.domains], rows)


def rates_table(runs: Runs) -> str:
    rows = []
    for domain, found in runs.result["runs"].items():
        tried = {
            key.rsplit(" at ", 1)[0] for key in found if key not in {f"{m} at {r:g}" for m, r in runs.rates.items()}
        }
        for key, run in sorted(found.items()):
            if key.rsplit(" at ", 1)[0] in tried:
                forgotten = mean(change(run, old) for old in runs.old)
                rows.append([key, domain, f"{change(run, domain):+.2f}", f"{forgotten:+.2f}"])
    return markdown(["", "domain", "new", "old"], rows)


def texts_table(runs: Runs) -> str:
    rows = [
        [name, f"{size['train_bytes']:,}", f"{size['held_out_bytes']:,}"]
        for name, size in runs.result["texts"].items()
        if name in (*runs.domains, *runs.old)
    ]
    return markdown(["", "bytes to train on", "bytes held out"], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(runs: Runs, path: Path) -> None:
    """A bar for each method's mean, a dot for each domain: what was learned, and what was forgotten."""
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(runs.methods))
    titles = {
        "learned": f"Learned: change on {len(runs.domains)} new domains",
        "forgotten": "Forgotten: change on the old",
    }
    for axis, (value, title) in zip(panels, titles.items(), strict=True):
        for place, method in enumerate(runs.methods):
            colour = COLOURS[method.removesuffix(", replay")]
            axis.barh(place, runs.mean(method, value), 0.62, color=colour, alpha=0.85)
            each = [getattr(runs, value)(domain, method) for domain in runs.domains]
            axis.scatter(each, [place] * len(each), s=13, color="#222222", alpha=0.6, linewidths=0, zorder=3)
        sign = -1 if value == "learned" else 1
        for place, method in zip(places, runs.methods, strict=True):
            axis.annotate(
                f"{runs.mean(method, value):+.2f}", (0, place), (-sign * 5, 0), textcoords="offset points",
                va="center", fontsize=9, ha="left" if sign < 0 else "right",
            )  # fmt: skip
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set(title=title, xlabel="bits per byte of held-out text, lower is better")
        low, high = axis.get_xlim()
        axis.set_xlim(low - (0.14 * high if sign > 0 else 0), high - (0.14 * low if sign < 0 else 0))
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, runs.methods)
    panels[0].invert_yaxis()
    figure.supxlabel("Bars and numbers: the mean; dots: each new domain. One run, one seed each.", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
