"""Messages reach the standard error unchanged."""

from hf_moe.io.console import print_to_stderr


def test_a_message_is_printed_as_it_is(capsys):
    message = "error: [bold]model[/bold] " + " ".join(["a/long/path"] * 20)
    print_to_stderr(message)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{message}\n")
