"""Take what names a person or a machine out of a text: tokens, local paths, user@host."""

import getpass
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hf_moe.hub.secrets import TOKEN, other_secrets

REMOVED = "[token removed]"
# a folder of this machine before a file's name; no part of a URL, of owner/name, of "a / b" or of a part that opens
_UNIX = re.compile(r"(?<![\w./~\\-])(?!/(?:details|summary)>)(?:file://|~)?/(?:[\w.@+\\-]+/)*(?=[\w.@+\\-])")
_WINDOWS = re.compile(r"\b[A-Za-z]:[\\/]+(?:[\w .@+-]+[\\/]+)*")


def scrub(text: str) -> str:
    """`text` without tokens, and with the last part of local paths in their place.

    Tokens of services other than the Hub are found with the extra `push`; a push needs it, and looks once more.
    Made for finished Markdown: every value of a card passes here, whatever it was read from.
    """
    text = re.sub(TOKEN.pattern.decode(), REMOVED, text)
    for _, secret in other_secrets(text.encode()) if find_spec("kingfisher_sdk") else ():
        text = text.replace(secret, REMOVED)
    for folder in {str(Path.home()), str(Path.cwd()), tempfile.gettempdir()} - {"/"}:
        text = re.sub(rf"{re.escape(folder)}(?=/)", "", text)
    text = _WINDOWS.sub("", _UNIX.sub("", text))
    return re.sub(rf"\b{re.escape(getpass.getuser())}@[\w.-]+", "user", text)
