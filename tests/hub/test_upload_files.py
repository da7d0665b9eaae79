"""Which files of a folder are sent; pickles, links, hostile names and tokens are not."""

import base64
import gzip
import io
import json
import random
import re
import string
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_moe.hub.errors import PushRefusedError
from hf_moe.hub.secrets import _scanner, secret_in
from hf_moe.hub.upload_files import checkpoint_folder, collect, kind_of

TOKEN = "hf_" + "aB3dE6gH9j" * 3 + "xyz"
LETTERS = string.ascii_letters + string.digits


def some(count: int, letters: str = LETTERS) -> str:
    """Random text, so that no key of anybody stands here."""
    return "".join(random.Random(count).choices(letters, k=count))


def private_key(name: str) -> str:
    lines = "\n".join(some(64 + n)[:64] for n in range(12))
    return f"-----BEGIN {name}PRIVATE KEY-----\n{lines}\n-----END {name}PRIVATE KEY-----\n"


SECRETS = {
    "Hub user": "hf_" + some(34, string.ascii_letters),
    "Hub organisation": "api_org_" + some(34, string.ascii_letters),
    "Hub OAuth": "hf_oauth_" + some(43),
    "Hub OAuth as JWT": f"hf_oauth_eyJhbGciOiJFZERTQSJ9.{some(160)}.{some(86)}",
    "Hub job": f"hf_jwt_eyJhbGciOiJFZERTQSJ9.{some(161)}.{some(87)}",
    "AWS pair": f"aws_access_key_id = AKIA{some(16, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ234567')}\n"
    f"aws_secret_access_key = {some(40)}\n",
    "GitHub": "ghp_" + some(36),
    "GitHub, fine-grained": f"github_pat_{some(22)}_{some(59)}",
    "OpenAI": f"sk-proj-{some(74)}T3BlbkFJ{some(75)[:74]}",
    "OpenAI, old": f"sk-{some(20)}T3BlbkFJ{some(21)[:20]}",
    "Anthropic": f"sk-ant-api03-{some(93)}AA",
    "Slack": f"xoxb-{some(12, string.digits)}-{some(13, string.digits)}-{some(24)}",
    "Google": "AIza" + some(35),
    "private key": private_key("OPENSSH "),
    "private key, PKCS 8": private_key(""),
}


def zipped(text: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.txt", text)
    return file.getvalue()


def tar(text: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        entry = tarfile.TarInfo("x.txt")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text.encode()))
    return file.getvalue()


FORMS = {
    "plain": lambda text: f"# Card\n\nuse {text} here\n".encode(),
    "JSON": lambda text: json.dumps({"note": text}).encode(),
    "JSON escapes": lambda text: ('{"note": "' + "".join(f"\\u{ord(c):04x}" for c in text) + '"}').encode(),
    "base64": lambda text: b"note: " + base64.b64encode(f"export KEY={text}\n".encode()) + b"\n",
    "UTF-16": lambda text: text.encode("utf-16"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "zip": zipped,
    "tar.gz": tar,
    "cut by a line end": lambda text: f"a {text[: len(text) // 2]}\n{text[len(text) // 2 :]} b".encode(),
}
KINDS = {
    "model.safetensors": "weights",
    "model-00001-of-00012.safetensors": "weights",
    "model.safetensors.index.json": "weights",
    "adapter_model.safetensors": "weights",
    "model.fp16.safetensors": "weights",
    "generation_config.json": "config",
    "preprocessor_config.json": "config",
    "tokenizer.model": "tokenizer",
    "sentencepiece.bpe.model": "tokenizer",
    "source.spm": "tokenizer",
    "merges.txt": "tokenizer",
    "additional_chat_templates/tools.jinja": "tokenizer",
    "router_hash.json": "router",
    ".eval_results/gsm8k.yaml": "results",
    "plots/loss.png": "plots",
    "LICENSE": "card",
    "pytorch_model.bin": None,
    "model.safetensors.superseded": None,
    "sub/model.safetensors": None,
    "plots/../x.png": None,
    "trainer_state.json": None,
    "handler.py": None,
}


@pytest.mark.parametrize("path", KINDS)
def test_kinds(path):
    assert kind_of(path) == KINDS[path]


def model(folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "olmoe", **config}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def sent(folder: Path, add=()) -> set[str]:
    return {upload.path for upload in collect(folder, add)[0]}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("training_args.bin", "a pickle: .* may hold a token"),
        ("optimizer.pt", "a pickle"),
        ("rng_state.pth", "a pickle"),
        (".tmp12ab", "unfinished"),
        ("model.safetensors.superseded", "unfinished"),
        (".netrc", "hidden"),
        ("trainer_state.json", "--add"),
        ("handler.py", "--add"),
    ],
)
def test_what_stays_behind_says_why(name, reason, tmp_path):
    (model(tmp_path) / name).write_bytes(b"x")
    uploads, left = collect(tmp_path)
    assert {upload.path for upload in uploads} == {"config.json", "model.safetensors"}
    assert [each.path for each in left] == [name]
    assert re.search(reason, left[0].reason)


def test_added_files_keep_their_names(tmp_path):
    folder = model(tmp_path / "model")
    extra = tmp_path / "more"
    (extra / "deep").mkdir(parents=True)
    (extra / "deep" / "a.txt").write_text("a")
    (tmp_path / "handler.py").write_text("")
    assert sent(folder, [extra, tmp_path / "handler.py"]) >= {"more/deep/a.txt", "handler.py"}
    (extra / "all.pkl").write_bytes(b"x")
    assert "more/all.pkl" not in sent(folder, [extra])
    with pytest.raises(PushRefusedError, match="does not exist"):
        collect(folder, [tmp_path / "nothing"])


def test_folders_stay_behind_and_are_named(tmp_path):
    for name in ("onnx", ".git"):
        (model(tmp_path) / name).mkdir()
    assert {left.path: left.reason for left in collect(tmp_path)[1]} == {
        "onnx": "a folder; --add sends it",
        ".git": "hidden",
    }


def test_a_model_and_an_adapter_in_one_folder(tmp_path):
    """transformers would load the adapter on its base, and nothing of the model."""
    (model(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(PushRefusedError, match=r"a model \(config.json\) and an adapter .* two folders"):
        collect(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "plots", "router_hash.json"])
def test_links_are_not_followed(name, tmp_path):
    folder = model(tmp_path / "model")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "loss.png").write_bytes(b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside if name == "plots" else outside / "loss.png")
    with pytest.raises(PushRefusedError, match="is a link; links are not followed"):
        collect(folder)


def test_links_among_added_files_are_not_followed(tmp_path):
    folder = model(tmp_path / "model")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "passwd").symlink_to("/etc/passwd")
    (tmp_path / "link").symlink_to(tmp_path / "more")
    for added in (tmp_path / "more", tmp_path / "link"):
        with pytest.raises(PushRefusedError, match="links are not followed"):
            collect(folder, [added])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../evil.Model", "must be 'module.Class'"),
        ("/etc/passwd.Model", "must be 'module.Class'"),
        ("a.b.Model", "must be 'module.Class'"),
        (7, "must be 'module.Class'"),
        ("missing.Model", "names missing.py, which is not there"),
        ("half.Model", "half.py imports .*other.py"),
    ],
)
def test_code_that_nobody_could_load(name, words, tmp_path):
    folder = model(tmp_path, auto_map={"AutoModel": name})
    (folder / "half.py").write_text("from .other import x\n")
    with pytest.raises(PushRefusedError, match=words):
        collect(folder)


def test_code_goes_with_what_it_imports_and_nothing_else(tmp_path):
    folder = model(tmp_path, auto_map={"AutoModel": "mine.Model", "AutoConfig": "owner/name--theirs.Config"})
    for name, text in {"mine": "from .parts import x", "parts": "x = 1", "stranger": "y = 2"}.items():
        (folder / f"{name}.py").write_text(text)
    assert {path for path in sent(folder) if path.endswith(".py")} == {"mine.py", "parts.py"}


def test_a_recipes_results_folder(tmp_path):
    model(tmp_path / "model")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "README.md").write_text("speaks of the folder `model`")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"x")
    assert sent(tmp_path) == {"config.json", "model.safetensors", "report.json", "plots/loss.png"}
    model(tmp_path / "adapter")
    with pytest.raises(PushRefusedError, match=r"holds two: push '.*model' or '.*adapter'"):
        checkpoint_folder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_a_config_that_is_no_table(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PushRefusedError, match=r"is not valid JSON|must hold a JSON object"):
        collect(tmp_path)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(PushRefusedError, match="is no folder"):
        collect(tmp_path / "x")
    with pytest.raises(PushRefusedError, match=r"holds no config\.json and no adapter_config\.json"):
        collect(tmp_path)


def test_the_hosts_empty_card_stays_behind(tmp_path):
    folder = model(tmp_path)
    (folder / "README.md").write_text("# Model\n" + "- **What:** [More Information Needed]\n" * 30)
    uploads, left = collect(folder)
    assert "README.md" not in {upload.path for upload in uploads}
    assert "empty template" in left[0].reason
    (folder / "README.md").write_text("# Mine\nstill to say: [More Information Needed]\n")
    assert "README.md" in sent(folder)


def test_tokens_are_found_wherever_they_are(tmp_path):
    padding = 2**22 - 10
    cases = {
        "args.bin": b"\x80\x05\x95" + TOKEN.encode() + b"\x94.",
        "across.json": b" " * padding + TOKEN.encode(),
        "deep.txt": b" " * (3 * 2**22) + TOKEN.encode() + b" " * 100,
        "key-across.txt": b" " * padding + SECRETS["private key"].encode(),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        assert secret_in(tmp_path / name), name
    header = json.dumps({"__metadata__": {"note": TOKEN}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert secret_in(tmp_path / "w.safetensors")
    assert secret_in(b"a known-token-1 b", ["known-token-1"])


# a private key has lines of its own
CASES = [(kind, form) for kind in SECRETS for form in FORMS if "key" not in kind or form != "cut by a line end"]


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_secrets_of_every_kind_are_found_in_every_form(kind, form, tmp_path):
    """Of these, in the plain form, a push once sent all but the first two."""
    text = SECRETS[kind]
    (tmp_path / "x").write_bytes(FORMS[form](text))
    found = secret_in(tmp_path / "x")
    assert found
    assert text not in found


ORDINARY = {
    "names": b"hf_moe hf_alice_write HfMoeForCausalLM hf_oauth_callback_url_of_the_application hf_short123",
    "nothing": b"",
    "hashes": "\n".join(f"{some(64 + n, '0123456789abcdef')} model-{n}.safetensors" for n in range(99)).encode(),
    "base64": base64.b64encode(random.Random(0).randbytes(300_000)),
    "tokenizer": json.dumps({"vocab": {some(2 + n)[:60]: n for n in range(1_000)}}).encode(),
    "vocabulary": "\n".join(some(6 + n)[: 6 + n % 30] for n in range(1_000)).encode(),
    "words over lines": b"hf_" + b"\n".join(b"transformer" for _ in range(99)),
    "card": b"---\nlicense: mit\n---\n`HF_TOKEN=hf_...`, `api_key=os.environ['KEY']`, revision="
    + b"3f1d2c" * 6
    + b"3f1d",
}


@pytest.mark.parametrize("case", ORDINARY)
def test_what_is_no_secret(case):
    assert secret_in(ORDINARY[case], [""]) is None


def test_the_numbers_of_a_tensor_are_not_searched(tmp_path):
    """Gigabytes of them."""
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + TOKEN.encode())
    assert secret_in(tmp_path / "w.safetensors") is None


def test_the_extra_is_named(monkeypatch):
    _scanner.cache_clear()
    monkeypatch.setitem(sys.modules, "kingfisher_sdk", None)
    with pytest.raises(ImportError, match=r'pip install "hf-moe\[push\]"'):
        secret_in(b"x")


def test_a_folder_that_is_added_leaves_behind_what_may_hold_keys(tmp_path):
    folder, extra = model(tmp_path / "model"), tmp_path / "more"
    kept = {
        ".env": "keys",
        ".env.local": "keys",
        "prod.env": "keys",
        ".git/config": "keys",
        ".netrc": "keys",
        "deep/id_rsa": "keys",
        "deep/server.pem": "keys",
        ".cache/x": "hidden",
        "deep/.ipynb_checkpoints/x": "hidden",
    }
    for name in (*kept, "deep/a.txt"):
        (extra / name).parent.mkdir(parents=True, exist_ok=True)
        (extra / name).write_text("x")
    uploads, left = collect(folder, [extra])
    assert {upload.path for upload in uploads if upload.kind == "added"} == {"more/deep/a.txt"}
    reasons = {each.path: each.reason for each in left}
    for name, why in kept.items():
        hidden = next(path for path in reasons if f"more/{name}".startswith(path))
        assert why in reasons[hidden]
    for name in (".env", "deep/id_rsa", ".git"):
        with pytest.raises(PushRefusedError, match="a place for passwords and keys; it is never sent"):
            collect(folder, [extra / name])
