"""What an evaluation refuses."""


class EvaluationError(ValueError):
    """A task, data, model or results file that cannot be used; says which, why, and what to do."""
