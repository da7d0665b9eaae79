"""Errors of data, and the rows that cannot be used: they end a run with count and first lines, or are left out."""

from collections.abc import Iterator
from contextlib import contextmanager

POLICIES = ("error", "skip")
LISTED = 5


class DataError(ValueError):
    """Data that cannot be used: names the file, data set or domain, the rule, and the way out."""


class RowError(DataError):
    """One row that cannot be used; `BadRows` adds its number."""


class BadRows:
    """The bad rows of one data set.

    Args:
        where: The data set.
        policy: `error` or `skip`.
        unit: What the numbers count: "line" of a text file, else "row".

    Raises:
        DataError: For an unknown policy.
    """

    def __init__(self, where: str, policy: str = "error", unit: str = "row"):
        if policy not in POLICIES:
            raise DataError(f"on_bad_row must be one of {', '.join(POLICIES)}, got {policy!r}.")
        self.where, self.policy, self.unit = where, policy, unit
        self.reasons: dict[int, str] = {}

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Record a RowError that is raised inside as this row's; the next row follows."""
        try:
            yield
        except RowError as error:
            self.reasons.setdefault(number, str(error))

    def settle(self, total: int) -> None:
        """Decide, once every row has been tried, whether the bad ones end the run.

        Raises:
            DataError: If there are bad rows that may not be skipped, or no other ones.
        """
        if len(self.reasons) == total and total:
            raise DataError(f"no row of {self.where!r} can be used. {self._reason()} Mend them.")
        if self.reasons and self.policy == "error":
            raise DataError(
                f"{len(self.reasons):,} of {total:,} rows of {self.where!r} cannot be used ({self._numbers()}). "
                f"{self._reason()} Mend them, or leave them out with on_bad_row skip."
            )

    def __str__(self) -> str:
        """A sentence about what was left out; empty if nothing."""
        if not self.reasons:
            return ""
        count = len(self.reasons)
        return f"{count:,} bad row{'s' * (count > 1)} left out ({self._numbers()}). {self._reason()}"

    def _numbers(self) -> str:
        numbers = sorted(self.reasons)
        more = ", ..." if len(numbers) > LISTED else ""
        plural = "" if len(numbers) == 1 else "s"
        return f"{self.unit}{plural} {', '.join(map(str, numbers[:LISTED]))}{more}"

    def _reason(self) -> str:
        first = min(self.reasons)
        reason = self.reasons[first]
        return f"{self.unit.capitalize()} {first}: {reason}{'' if reason.endswith('.') else '.'}"
