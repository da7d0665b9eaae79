"""Find access tokens and private keys in files that are about to be sent.

Tokens of the Hub, of every form, are found by a pattern of our own; those of other services and private keys by the
rules of MongoDB's Kingfisher (the extra `push`), of which those that it is certain of count. Both are searched for in
the bytes as they are, in base64 (twice over), UTF-16 and JSON escapes, across line ends, and in archives. What is
hidden in another way (hexadecimal, encrypted, as the numbers of a tensor) is not found, nor is half a pair of keys.
"""

import binascii
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_moe.io.installation import install_command

logger = logging.get_logger(__name__)

# OAuth and job tokens have dots and underscores, as many a name in code has: one capital or digit tells them apart
_LONG = rb"hf_(?:oauth|jwt)_(?=[a-z_.-]*[A-Z0-9])[A-Za-z0-9_-]{20,}(?:\.[A-Za-z0-9_-]+)*"
TOKEN = re.compile(rb"(?:hf|api_org)_[A-Za-z0-9]{30,}|" + _LONG)
# where lines were joined: those of a vocabulary become endless words
_WHOLE_TOKEN = re.compile(rb"(?<![\w-])(?:(?:hf|api_org)_[A-Za-z0-9]{30,45}|" + _LONG + rb")(?![\w-])")
_HUB_TOKEN = "an access token of the Hugging Face Hub"
_SHORTEST = 8  # of a known token that is looked for as it is
_CHUNK = 2**22
_OVERLAP = 2**13  # a private key
_LARGEST_HEADER = 100_000_000  # bytes; what safetensors reads at most
_LARGEST_ARCHIVE = 2**28  # bytes, unpacked
_ARCHIVES = {b"\x1f\x8b": ".gz", b"PK\x03\x04": ".zip", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
_ESCAPE = re.compile(rb"\\u00([0-7][0-9A-Fa-f])")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{44,}")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
# a line end, written or escaped, within what may be a token
_CUT = re.compile(rb"(?<=[A-Za-z0-9_-]{6})\\?(?:\r?\n|\\n)[ \t]*(?=[A-Za-z0-9_-]{6})")


def secret_in(source: Path | bytes, known: Iterable[str] = ()) -> str | None:
    """Name the secret that the file or the bytes hold: what looks like one, or one of `known`; None if there is none.

    Of a safetensors file the header is read (names and metadata); its tensors are numbers.

    Raises:
        ImportError: Without the extra `push`.
    """
    literals = [token.encode() for token in known if len(token) >= _SHORTEST]
    for part in _parts(source):
        for view, pattern in _views(part):
            texts = [view, *_decoded(view)]
            if any(pattern.search(text) or any(token in text for token in literals) for text in texts):
                return _HUB_TOKEN
            if found := next(other_secrets(view), None):
                return f"what looks like a secret ({found[0]})"
    return None


def other_secrets(data: bytes) -> Iterator[tuple[str, str]]:
    """Kind and text of other services' secrets that Kingfisher is certain of: documentation is full of the rest."""
    for found in _scanner().scan(data):
        if found.visible and found.confidence == "high":
            yield found.rule_id.rpartition(".")[2], found.secret


@cache
def _scanner() -> Any:
    try:
        from kingfisher_sdk import DetectionPolicy, Rules, Scanner
    except ImportError as error:
        raise ImportError(
            f"finding secrets needs kingfisher_sdk. Install it with: {install_command('push')}"
        ) from error
    return Scanner(Rules(confidence="medium"), policy=DetectionPolicy(inline_ignores=False, markup_context=False))


def _views(part: bytes) -> Iterator[tuple[bytes, re.Pattern[bytes]]]:
    """The bytes, and the same without an encoding that hides a token; each with the pattern to look for."""
    yield part, TOKEN
    if b"\0" in part:  # UTF-16, also in the middle of a file
        part = part.replace(b"\0", b"")
        yield part, TOKEN
    plain = _ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]), part)
    if plain != part:
        yield plain, TOKEN
    joined = _CUT.sub(b"", plain)
    if joined != plain:
        yield joined, _WHOLE_TOKEN


def _decoded(data: bytes, times: int = 2) -> Iterator[bytes]:
    """Decoded base64 in `data`; Kingfisher does the same for its own rules."""
    for run in _BASE64.findall(data):
        text = run.translate(_URL_SAFE)
        found = binascii.a2b_base64(text[: len(text) // 4 * 4])
        yield found
        if times > 1:
            yield from _decoded(found, times - 1)


def _parts(source: Path | bytes) -> Iterator[bytes]:
    """Overlapping pieces of the content; of an archive also those of its members."""
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        if source.suffix == ".safetensors":
            yield file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST_HEADER))
            return
        is_archive = _archive_suffix(file.read(512)) is not None
        file.seek(0)
        if is_archive:
            yield from _members(file.read(_LARGEST_ARCHIVE + 1))
            file.seek(0)
        end = b""
        while chunk := file.read(_CHUNK):
            yield end + chunk
            end = chunk[-_OVERLAP:]


def _members(data: bytes, depth: int = 2) -> Iterator[bytes]:
    """Members of the archive in `data`, and of archives within; nothing if it is none."""
    suffix = _archive_suffix(data)
    if suffix is None or not depth:
        return
    from kingfisher_sdk import ScanInput, expand_archives

    try:
        if len(data) > _LARGEST_ARCHIVE:
            raise ValueError(f"it has more than {_LARGEST_ARCHIVE:,} bytes")
        members = list(expand_archives([ScanInput(f"x{suffix}", data)], depth=1, max_bytes=_LARGEST_ARCHIVE))
    except (RuntimeError, ValueError) as error:
        logger.warning(f"No secrets were looked for within an archive that cannot be unpacked: {error}.")
        return
    for member in members:
        yield member.data or b""
        yield from _members(member.data or b"", depth - 1)


def _archive_suffix(start: bytes) -> str | None:
    """The kind of archive by its first bytes, whatever its name; None if it is none."""
    if start[257:262] == b"ustar":
        return ".tar"
    return next((suffix for magic, suffix in _ARCHIVES.items() if start.startswith(magic)), None)
