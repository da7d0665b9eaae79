"""Metric modules of the `evaluate` library, loaded by path: `evaluate.load(metric_path("expert_utilization"))`."""

from pathlib import Path

METRICS = ("expert_utilization", "routing_agreement")


def metric_path(name: str) -> str:
    """The folder that `evaluate.load` takes.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}.")
    return str(Path(__file__).parent / name)
