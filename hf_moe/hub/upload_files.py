"""Choose the files of a folder that make a model or an adapter on the Hub; say why the others are left out."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_moe.hub.errors import PushRefusedError
from hf_moe.io import json_files

ADAPTER_CONFIG, CONFIG, CARD = "adapter_config.json", "config.json", "README.md"
# what an untouched template of transformers or PEFT is full of
TEMPLATE_WORDS = "[More Information Needed]"

KINDS = {
    "weights": r"(adapter_)?model(\.[\w-]+)?(-\d+-of-\d+)?\.safetensors(\.index(\.[\w-]+)?\.json)?",
    "config": r"((generation_|adapter_|processor_|preprocessor_|video_preprocessor_|image_processor_)?config)\.json",
    "tokenizer": r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken|chat_template)\.json"
    r"|(vocab|merges)\.txt|[\w.-]+\.(model|spm|tiktoken)|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja",
    "router": r"router_hash\.json",
    "results": r"(results|report|trace|selection)\.json|\.eval_results/[\w.-]+\.ya?ml",
    "plots": r"plots/[\w.-]+\.(png|svg)",
    "card": r"README\.md|LICENSE(\.\w+)?|NOTICE(\.\w+)?",
}
_LARGEST_JSON = 500_000_000  # bytes; tokenizers of many languages have tens of millions
# where passwords, tokens and private keys are kept, whatever is in it
_KEPT_SECRET = (
    r"\.env(\..*)?|.*\.env|\.git|\.git-credentials|[._]netrc|\.(pypirc|npmrc|pgpass|htpasswd|ssh|aws|gnupg|kube|docker)"
    r"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)|(aws_|gcloud_)?credentials(\.json)?"
    r"|application_default_credentials\.json|client_secret.*\.json|secrets?\.(json|ya?ml|toml)"
)
_KEYS_INSIDE = "a place for passwords and keys"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


@dataclass(frozen=True)
class Upload:
    """One file of the commit: its path in the repository, where its bytes are, and what it is for (see `KINDS`)."""

    path: str
    source: Path | bytes
    kind: str


@dataclass(frozen=True)
class LeftOut:
    path: str
    reason: str


def kind_of(path: str) -> str | None:
    """The kind of a file (a key of `KINDS`), by its path in the repository; None for all else, code included."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, path)), None)


def checkpoint_folder(folder: Path) -> Path:
    """The folder that holds the model or the adapter: `folder`, or its one part `model` or `adapter`.

    Raises:
        PushRefusedError: If there is none, or more than one.
    """
    if not folder.is_dir():
        raise PushRefusedError(f"{str(folder)!r} is no folder. Name the folder of a saved model or adapter.")
    if is_checkpoint(folder):
        return folder
    parts = [folder / name for name in ("model", "adapter") if is_checkpoint(folder / name)]
    if len(parts) == 1:
        return parts[0]
    if parts:
        raise PushRefusedError(f"{str(folder)!r} holds two: push {str(parts[0])!r} or {str(parts[1])!r}.")
    raise PushRefusedError(
        f"{str(folder)!r} holds no {CONFIG} and no {ADAPTER_CONFIG}. Name the folder that save_pretrained wrote."
    )


def is_checkpoint(folder: Path) -> bool:
    """True for a folder with a model or an adapter."""
    return (folder / CONFIG).is_file() or (folder / ADAPTER_CONFIG).is_file()


def collect(folder: Path, add: Sequence[Path] = ()) -> tuple[list[Upload], list[LeftOut]]:
    """Sort the files of `folder` into those that go to the Hub and those that are left out, with the reason.

    Of a recipe's results folder the part that is the model or the adapter goes to the root of the repository, with the
    report and the plots that lie beside it. An untouched template of a model card is left out.

    Args:
        add: More files or folders to send, under their own names.

    Raises:
        PushRefusedError: If there is nothing to push, a model and an adapter in one folder, or a file to send is a
            link.
    """
    checkpoint = checkpoint_folder(folder)
    if (checkpoint / CONFIG).is_file() and (checkpoint / ADAPTER_CONFIG).is_file():
        raise PushRefusedError(
            f"{str(checkpoint)!r} holds a model ({CONFIG}) and an adapter ({ADAPTER_CONFIG}): who loads it gets the "
            "adapter on its base, not this model. Save them into two folders and push each to its own repository."
        )
    found: dict[str, Upload] = {}
    left: list[LeftOut] = []
    code = code_files(checkpoint)
    for path, source in _walk(checkpoint):
        _add_or_leave_out(path, source, "code" if path in code else kind_of(path), found, left)
    if checkpoint != folder:  # a recipe's results: the card there names its folders, so another is written
        for path, source in _walk(folder):
            if kind_of(path) in ("results", "plots"):
                _add_or_leave_out(path, source, kind_of(path), found, left)
    for source in add:
        if _may_hold_keys(source.name):
            raise PushRefusedError(f"--add {str(source)!r}: {_KEYS_INSIDE}; it is never sent.")
        for path, each in _added(source, left):
            _add_or_leave_out(path, each, kind_of(path) or "added", found, left)
    return sorted(found.values(), key=lambda upload: upload.path), left


def _add_or_leave_out(
    path: str, source: Path, kind: str | None, found: dict[str, Upload], left: list[LeftOut]
) -> None:
    reason = _reason_to_leave(path, source, kind)
    if reason is not None:
        left.append(LeftOut(path, reason))
    elif source.is_symlink():
        raise PushRefusedError(f"{str(source)!r} is a link; links are not followed. Copy the file into the folder.")
    else:
        assert kind is not None
        found[path] = Upload(path, source, kind)


def _reason_to_leave(path: str, source: Path, kind: str | None) -> str | None:
    name = source.name
    if source.is_dir() and not source.is_symlink():
        return "hidden" if name.startswith(".") else "a folder; --add sends it"
    if source.suffix in _PICKLES:
        return "a pickle: it can run code where it is loaded" + (
            ", and it may hold a token" if name == "training_args.bin" else ""
        )
    if ".tmp" in name or name.endswith((".superseded", ".incomplete")):
        return "an unfinished file"
    if kind is None:
        return "hidden" if name.startswith(".") else "not a file of a model; --add sends it"
    if path == CARD and is_template(source):
        return "an empty template; a card is written from the facts"
    return None


def is_template(card: Path) -> bool:
    """True for the template of a model card, of transformers or PEFT, that nobody filled in."""
    return card.read_text(encoding="utf-8", errors="replace").count(TEMPLATE_WORDS) >= 10


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """The entries of the folder, and of the few folders in it that a repository of ours has."""
    for entry in sorted(folder.iterdir()):
        if entry.name in ("plots", ".eval_results", "additional_chat_templates") and entry.is_dir():
            if entry.is_symlink():
                raise PushRefusedError(f"{str(entry)!r} is a link; links are not followed. Copy the folder itself.")
            yield from ((f"{entry.name}/{file.name}", file) for file in sorted(entry.iterdir()))
        else:
            yield entry.name, entry


def _added(source: Path, left: list[LeftOut]) -> Iterator[tuple[str, Path]]:
    """The file, or those of the folder; hidden ones and those that may hold keys are added to `left`."""
    if not source.exists():
        raise PushRefusedError(f"--add {str(source)!r} does not exist.")
    name = source.name if source.name not in ("", "..") else source.resolve().name
    if source.is_symlink():
        raise PushRefusedError(f"--add {str(source)!r} is a link; links are not followed. Name the file itself.")
    if source.is_file():
        yield name, source
        return
    yield from _inside(source, name, left)


def _inside(folder: Path, name: str, left: list[LeftOut]) -> Iterator[tuple[str, Path]]:
    for entry in sorted(folder.iterdir()):
        path = f"{name}/{entry.name}"
        if _may_hold_keys(entry.name) or entry.name.startswith("."):
            left.append(LeftOut(path, _KEYS_INSIDE if _may_hold_keys(entry.name) else "hidden"))
        elif entry.is_symlink():
            raise PushRefusedError(f"{str(entry)!r} is a link; links are not followed. Copy it into the folder.")
        elif entry.is_dir():
            yield from _inside(entry, path, left)
        elif entry.is_file():
            yield path, entry


def _may_hold_keys(name: str) -> bool:
    return re.fullmatch(_KEPT_SECRET, name, re.IGNORECASE) is not None


def code_files(folder: Path) -> set[str]:
    """The Python files that `auto_map` of a config in `folder` names, and their siblings that they import.

    Raises:
        PushRefusedError: If one is missing: others could not load what is pushed.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    names: set[str] = set()
    for config in ("config.json", "tokenizer_config.json", "processor_config.json"):
        for module in _mapped_modules(folder / config):
            file = folder / f"{module}.py"
            if not file.is_file():
                raise PushRefusedError(
                    f"auto_map in {str(folder / config)!r} names {file.name}, which is not there: nobody could load "
                    "this without the code. Save the model again with save_pretrained."
                )
            try:
                names |= {file.name, *(Path(path).name for path in get_relative_import_files(str(file)))}
            except FileNotFoundError as error:
                raise PushRefusedError(
                    f"{file.name} imports {error.filename!r}, which is not there. Save the model again."
                ) from error
    return names


def _mapped_modules(config: Path) -> Iterable[str]:
    """Modules of this folder that an `auto_map` names; `owner/name--module.Class` lies in another repository."""
    if not config.is_file():
        return
    auto_map = read_json(config).get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise PushRefusedError(f"auto_map in {str(config)!r} must be a table, got {auto_map!r:.80}.")
    for value in auto_map.values():
        for name in value if isinstance(value, list) else [value]:
            if name is None or "--" in str(name):
                continue
            if not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", str(name), re.ASCII):
                raise PushRefusedError(f"auto_map in {str(config)!r} names {name!r:.80}; it must be 'module.Class'.")
            yield str(name).partition(".")[0]


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        PushRefusedError: If the file holds none.
    """
    try:
        return json_files.read_object(path, largest=_LARGEST_JSON, allow_nan=True)
    except ValueError as error:
        raise PushRefusedError(f"{str(path)!r} is not valid JSON ({error}). Save it again.") from error
