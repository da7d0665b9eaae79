"""The title of a card in words, and the sentences that come first."""

from collections.abc import Mapping, Sequence

from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts
from hf_moe.hub.cards.markdown import cell
from hf_moe.hub.cards.metadata import is_repo
from hf_moe.hub.cards.training_facts import TrainingFacts

_MOST_NAMES = 5


def title(checkpoint: CheckpointFacts, training: TrainingFacts, name: str, base: str | None) -> str:
    """Such as "OLMoE-1B-7B with expert LoRA, fine-tuned on law"; the name if no report tells what it was made from."""
    if training.recipe is None:
        return name
    if training.is_from_scratch and not checkpoint.is_adapter:
        return f"{_size_and_kind(checkpoint, training)}, trained on {listed(training.trained_on)}"
    subject = str(base).rpartition("/")[2] if is_repo(base) else _size_and_kind(checkpoint, training)
    kind = f" with {checkpoint.adapter_kind}" if checkpoint.adapter_kind else ""
    if not training.tuned_on:
        return f"{subject}{kind}" if kind else name
    how = "trained by DPO on" if training.is_dpo else "fine-tuned on"
    manner = " with ESFT" if training.recipe.startswith("ESFT") else ""
    return f"{subject}{kind}, {how} {listed(training.tuned_on)}{manner}"


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"; of many the first five, and how many more there are."""
    shown = list(names[:_MOST_NAMES])
    if more := len(names) - len(shown):
        shown.append(f"{more} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def count(number: int) -> str:
    """A number of parameters in words: "3.9 million"."""
    for power, word in ((9, "billion"), (6, "million")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {word}"
    return f"{number:,}"


def _size_and_kind(checkpoint: CheckpointFacts, training: TrainingFacts) -> str:
    total = checkpoint.total or training.total
    return "A Mixture-of-Experts" + ("" if total is None else f" of {count(total)} parameters")


def summary(checkpoint: CheckpointFacts, training: TrainingFacts, base: str | None) -> str:
    """What it is, what was trained, and what that changed, as far as it is known."""
    return " ".join([_what(checkpoint, training, base), *_trained(training), *_changed(training)])


def _what(checkpoint: CheckpointFacts, training: TrainingFacts, base: str | None) -> str:
    total, active = checkpoint.total or training.total, checkpoint.active or training.active
    size = "" if total is None else f"{count(total)} parameters"
    if total is not None and active is not None:
        size += f", {count(active)} of them active for each token"
    if not checkpoint.is_adapter:
        return f"A Mixture-of-Experts language model{f' with {size}' if size else ''}."
    of = cell(base) if is_repo(base) else "a Mixture-of-Experts"
    kind = cell(checkpoint.adapter_kind or "adapter")
    return f"{kind[0].upper()}{kind[1:]} for {of}{f' ({size})' if size else ''}."


def _trained(training: TrainingFacts) -> list[str]:
    if training.trained is None or (training.is_from_scratch and training.trained == training.total):
        return []
    same = ", and the routers are the same as before" if training.router_is_same else ""
    return [f"{count(training.trained)} parameters were trained{same}."]


def _changed(training: TrainingFacts) -> list[str]:
    changes = {domain.name: domain.change for domain in training.domains if domain.change is not None}
    if not changes:
        return []
    bits: Mapping[str, Mapping[str, float | None]] = {domain.name: domain.bits for domain in training.domains}
    learned = [name for name in training.tuned_on if name in changes] or list(changes)
    first = min(learned, key=changes.__getitem__)
    found = [
        f"Held-out text of {cell(first)} takes {bits[first]['after']:.3f} bits per byte, {bits[first]['before']:.3f} "
        "before (lower is better)."
    ]
    others = {name: change for name, change in changes.items() if name not in learned}
    if others:
        worst = max(others, key=others.__getitem__)
        rise = f"The largest rise on other texts is {others[worst]:+.3f}, on {cell(worst)}."
        found.append(rise if others[worst] > 0 else "No other text got worse.")
    return found
