"""Predictions made before any kernel had run on a GPU (predictions.json), against a run: which assumption was wrong?

A prediction names the place of its quantity in the files of a run (`where`: several, the first that was measured
counts), the range, the assumption that it rests on, the device, and the blocks of the shipped tiles that it was made
for, by launch of the sweep.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PREDICTIONS = Path(__file__).with_name("predictions.json")


class Verdict(NamedTuple):
    prediction: Mapping[str, Any]
    measured: float

    @property
    def inside(self) -> bool:
        return self.prediction["low"] <= self.measured <= self.prediction["high"]


def verdicts(run: Mapping[str, Any], device: str) -> list[Verdict]:
    """Those predictions for `device` that the files of a run, by name, have something measured for."""
    pairs = [(prediction, _measured(run, prediction["where"])) for prediction in _made_for(device)]
    return [
        Verdict(prediction, measured)
        for prediction, measured in pairs
        if measured is not None and _has_tiles_of(prediction, run)
    ]


def number_for(device: str) -> int:
    return len(_made_for(device))


def _made_for(device: str) -> list[dict[str, Any]]:
    predictions = json.loads(PREDICTIONS.read_text())["predictions"]
    return [prediction for prediction in predictions if prediction["device"] in device]


def _measured(run: Mapping[str, Any], places: list[list[str]]) -> float | None:
    for place in places:
        found: Any = run
        for name in place:
            found = found.get(name, {})
        if found != {}:
            return found
    return None


def _has_tiles_of(prediction: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    shipped = {launch: facts.get("shipped", "") for launch, facts in run.get("sweep", {}).items()}
    wanted = prediction.get("tiles", {})
    return all(shipped.get(launch, "").startswith(f"{blocks}x") for launch, blocks in wanted.items())


def report(found: list[Verdict]) -> list[str]:
    """Lines: every assumption, whether its predictions held, and those that did not."""
    assumptions = json.loads(PREDICTIONS.read_text())["assumptions"]
    lines = []
    for name, text in assumptions.items():
        own = [verdict for verdict in found if verdict.prediction["rests_on"] == name]
        outside = [verdict for verdict in own if not verdict.inside]
        if own:
            held = "held" if not outside else f"WRONG in {len(outside)} of {len(own)}"
            lines.append(f"assumed: {text}: {held}")
        for verdict in outside:
            low, high = verdict.prediction["low"], verdict.prediction["high"]
            side = "above" if verdict.measured > high else "below"
            lines.append(f"    {verdict.prediction['of']}: {verdict.measured:g}, {side} {low:g} to {high:g}")
    return lines
