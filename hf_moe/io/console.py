"""Messages on the standard error, printed as they are."""

from rich.console import Console


def print_to_stderr(text: str) -> None:
    """Print one line: nothing in it is read as markup, coloured, or wrapped at the width of the terminal."""
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
