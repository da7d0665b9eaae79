"""Texts to be measured: files, folders of files and data sets of the Hub, as documents by domain."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import PreTrainedTokenizerBase

from hf_moe.data.bad_rows import LISTED, DataError, RowError
from hf_moe.data.chat_text import ChatText, text_of
from hf_moe.data.corpus import DOMAIN_NAME, embedded_corpus
from hf_moe.data.formats import FINE_TUNING, read_rows
from hf_moe.data.sources import FILES, Source, read_records
from hf_moe.io.console import print_to_stderr
from hf_moe.loading.errors import HUB_ERRORS, hub_sentence

Tokenizer = Callable[[], PreTrainedTokenizerBase]
EMBEDDED = "embedded"
EMBEDDED_BYTES = 20_000
# of a folder: many .json files hold no data
IN_FOLDERS = tuple(suffix for suffix in FILES if not suffix.startswith(".json") or suffix.startswith(".jsonl"))
_SECONDS = 10.0


def read_domains(paths: Sequence[str], tokenizer: Tokenizer, *, on_bad_row: str = "error") -> dict[str, list[str]]:
    """Documents by domain, to be measured: each path is a domain called after its file or folder.

    Args:
        paths: As of `read_documents`.
        tokenizer: Gives the one whose chat template writes conversations; asked if there are any.
        on_bad_row: Whether rows, and files of a folder, that cannot be used are an `error`, or left out (`skip`).

    Raises:
        DataError: If something cannot be read, or two paths have one name.
    """
    domains: dict[str, list[str]] = {}
    for path in paths:
        for name, documents in read_documents(path, tokenizer, on_bad_row=on_bad_row).items():
            if name in domains:
                raise DataError(f"two texts are called {name!r}. Rename one of the files.")
            domains[name] = [_without_start(text, tokenizer) for text in documents]
    return domains


def read_documents(
    path: str, tokenizer: Tokenizer, *, on_bad_row: str = "error", by_field: bool = False
) -> dict[str, list[str]]:
    """Documents by domain.

    Args:
        path: A file, a folder of files, a name on the Hub: what the recipes read. A conversation is the text that the
            chat template makes of it. "embedded" stands for the held-out part of the text that every Python
            installation carries (code, docs, legal, readme, arithmetic).
        by_field: Whether a record's `domain` names its domain, where it has one, and each file of a folder is a
            domain of its own; otherwise the whole folder is one.

    Raises:
        DataError: If it cannot be read. Of a folder, all files are tried first.
    """
    if path == EMBEDDED and not Path(path).exists():
        corpus = embedded_corpus(train_bytes=EMBEDDED_BYTES, held_out_bytes=EMBEDDED_BYTES)
        return {name: list(domain.held_out) for name, domain in corpus.items()}
    if Path(path).is_dir() and (files := _files(Path(path))):
        return _read_folder(path, files, tokenizer, on_bad_row=on_bad_row, by_field=by_field)
    _find(path)
    return _read(Source(path), tokenizer, on_bad_row=on_bad_row, by_field=by_field)


def _files(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.name.endswith(IN_FOLDERS) and file.is_file())
    # the card of a data set is no text of it
    return [file for file in found if file.name != "README.md"] or found


def _read_folder(
    path: str, files: Sequence[Path], tokenizer: Tokenizer, *, on_bad_row: str, by_field: bool
) -> dict[str, list[str]]:
    """What can be read of a folder; files that cannot be are bad rows of it."""
    domain = "" if by_field else Source(path).domain
    domains: dict[str, list[str]] = {}
    failed: dict[Path, DataError] = {}
    for file in files:
        try:
            found = _read(Source(str(file), domain), tokenizer, on_bad_row=on_bad_row, by_field=by_field)
        except DataError as error:
            failed[file] = error
            continue
        for name, documents in found.items():
            domains.setdefault(name, []).extend(documents)
    if failed:
        _settle(path, failed, len(files), on_bad_row)
    return domains


def _settle(path: str, failed: Mapping[Path, DataError], total: int, on_bad_row: str) -> None:
    """Decide, once every file has been tried, whether those that cannot be read end the run."""
    names = [str(file.relative_to(path)) for file in failed]
    listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    sentence = f"{len(failed):,} of {total:,} files of the folder {path!r} cannot be read ({listed})"
    first = next(iter(failed.values()))
    if len(failed) == total:
        raise DataError(f"{sentence}: {first}")
    if on_bad_row == "error":
        raise DataError(
            f"{sentence}: {first} Or name the files that you mean, or leave these out with on_bad_row skip."
        )
    print_to_stderr(f"{sentence} and are left out: {first}")


def _find(path: str) -> None:
    """Ask the Hub once for what is no file here: datasets tries for half a minute before it gives up."""
    from datasets import config

    if Path(path).exists() or path.endswith(FILES) or path.startswith((".", "/", "~")):
        return
    if config.HF_HUB_OFFLINE or any(Path(config.HF_DATASETS_CACHE).glob(f"{path.replace('/', '___')}")):
        return
    try:
        HfApi().dataset_info(path, timeout=_SECONDS)
    except HUB_ERRORS as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return  # the Hub is there: whoever loads the data gets its answer
        raise DataError(hub_sentence(error, path).replace("no folder here is", "no file or folder here is")) from error


def _read(source: Source, tokenizer: Tokenizer, *, on_bad_row: str, by_field: bool) -> dict[str, list[str]]:
    records, bad = read_records(source, on_bad_row=on_bad_row)
    data_set = read_rows(records, FINE_TUNING, bad)
    names: dict[int, str] = {}
    if by_field:
        data_set.unused = tuple(name for name in data_set.unused if name != "domain")
        for number, record in records:
            with bad.at(number):
                names[number] = _domain(record, source.domain)
    domains: dict[str, list[str]] = {}
    for number, text in data_set.apply(partial(text_of, tokenizer=cache(tokenizer))).items():
        domains.setdefault(names.get(number, source.domain), []).append(text)
    for remark in data_set.remarks():
        print_to_stderr(f"{source.path}: {remark}")
    return domains


def _domain(record: Mapping[str, Any], default: str) -> str:
    name = record["domain"] if record.get("domain") is not None else default
    if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name):
        raise RowError(f"'domain' must be 1 to 32 of the characters A-Z a-z 0-9 _ -, got {name!r}.")
    return name


def _without_start(text: str, tokenizer: Tokenizer) -> str:
    """Every document is measured after the token that begins a text, which some chat templates write as well."""
    if not isinstance(text, ChatText):
        return text
    return ChatText(text.removeprefix(tokenizer().bos_token or ""))


def shuffled(documents: Sequence[str]) -> list[str]:
    """The documents in a random order that is always the same: the first few are from all over a text."""
    order = list(documents)
    random.Random(0).shuffle(order)
    return order


def sample(documents: Sequence[str], max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first `shuffled` documents that have about `max_tokens` tokens together; the last one is cut."""
    left, found = max_tokens, []
    for text in shuffled(documents):
        length = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        data = text.encode()[: len(text.encode()) * left // length] if length > left else text.encode()
        found.append(type(text)(data.decode(errors="ignore")))  # a conversation stays one
        left -= length
        if left <= 0:
            break
    return [text for text in found if text]
