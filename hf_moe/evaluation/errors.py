"""The error of evaluations and comparisons."""


class EvaluationError(ValueError):
    """A task, data, model or results file that cannot be used; says which, why, and what to do."""
