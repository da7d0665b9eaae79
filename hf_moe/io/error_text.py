"""Text of another library's error in one line of bounded length: some list every tensor, or every model type."""


def one_line(error: BaseException, most: int = 400) -> str:
    """The first `most` characters of the error's text, without line ends; its type where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]
