"""Metric modules of the `evaluate` library, loaded by path: `evaluate.load(metric_path("expert_utilization"))`.

    expert_utilization/   how evenly tokens are spread over the experts of a layer
    routing_agreement/    how often two models send a token to the same experts

Each is a folder, because `evaluate.load` takes one.
"""

from pathlib import Path

METRICS = ("expert_utilization", "routing_agreement")


def metric_path(name: str) -> str:
    """Return the folder that `evaluate.load` takes.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}.")
    return str(Path(__file__).parent / name)
