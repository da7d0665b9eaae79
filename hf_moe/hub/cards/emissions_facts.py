"""Energy and emissions that codecarbon wrote beside a training run: Trainer does so with `report_to="codecarbon"`."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_moe.hub.cards.facts import CardError, finite
from hf_moe.hub.cards.markdown import plain

EMISSIONS = "emissions.csv"
_LARGEST = 10_000_000  # bytes
# Where codecarbon cannot tell the place it takes this one, whose power is among the cleanest. Source: `GeoMetadata`
# in codecarbon/external/geography.py.
_ASSUMED = ("46.8", "-71.2")


@dataclass(frozen=True)
class Emissions:
    """Sums over the recorded runs of the folder; codecarbon estimates them from what it reads of the machine.

    Attributes:
        energy: kWh.
        emissions: kg of CO2 equivalents.
        seconds: Time recorded, in seconds.
        runs: How many runs were recorded: one for each start of the training that came to its end.
        mode: codecarbon's tracking mode: "machine" counts all that runs on it, "process" the RAM of one process.
        version: Of codecarbon.
        location: Such as "quebec, Canada", or None.
        is_location_known: False where codecarbon assumed one: the emissions are then those of that place.
        hardware: GPUs and CPU by name, or None.
    """

    energy: float
    emissions: float
    seconds: float | None
    runs: int
    mode: str | None
    version: str | None
    location: str | None
    is_location_known: bool
    hardware: str | None


def emissions_facts(folder: Path) -> Emissions | None:
    """Facts of `folder/emissions.csv`; None without such a file.

    Raises:
        CardError: If the file is no such table, or holds no number.
    """
    path = folder / EMISSIONS
    if not path.is_file():
        return None
    runs = _runs(path)
    first = runs[0]  # codecarbon leaves empty columns out of rows that it appends, under the header of the first
    energy, emissions, seconds = (
        [finite(run.get(name)) for run in runs] for name in ("energy_consumed", "emissions", "duration")
    )
    if None in energy or None in emissions:
        raise CardError(
            f"{str(path)!r} has a row without energy_consumed or emissions. Remove the row, or the file: the energy "
            "then reads 'not measured'."
        )
    return Emissions(
        energy=sum(filter(None, energy)),
        emissions=sum(filter(None, emissions)),
        seconds=None if None in seconds else sum(filter(None, seconds)),
        runs=len(runs),
        mode=plain(first.get("tracking_mode") or "") or None,
        version=plain(first.get("codecarbon_version") or "") or None,
        location=_joined(first, "region", "country_name"),
        is_location_known=all((run.get("latitude"), run.get("longitude")) != _ASSUMED for run in runs),
        hardware=_joined(first, "gpu_model", "cpu_model"),
    )


def _runs(path: Path) -> list[Mapping[str, str]]:
    """The last row of each run: rows of one run add up in themselves."""
    try:
        if path.stat().st_size > _LARGEST:
            raise CardError(f"{str(path)!r} has more than {_LARGEST:,} bytes: that is no file of codecarbon.")
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise CardError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, csv.Error) as error:
        raise CardError(
            f"{str(path)!r} is no CSV file ({error}). Remove it if codecarbon did not write it."
        ) from error
    runs = {row.get("run_id") or str(number): row for number, row in enumerate(rows)}
    if not runs:
        raise CardError(f"{str(path)!r} holds no row. Remove it: the energy then reads 'not measured'.")
    return list(runs.values())


def _joined(row: Mapping[str, str], *names: str) -> str | None:
    return ", ".join(filter(None, (plain(row.get(name) or "").strip() for name in names))) or None
