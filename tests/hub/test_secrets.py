"""Tokens and keys are found in every form; what only looks like one is not."""

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

import pytest

from hf_moe.hub.secrets import _scanner, secret_in
from hf_moe.io.installation import install_command

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
    with pytest.raises(ImportError, match=re.escape(install_command("push"))):
        secret_in(b"x")
