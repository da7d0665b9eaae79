"""Files of a folder that are sent; pickles, links, keys and hostile names are not."""

import json
import re
from pathlib import Path

import pytest

from hf_moe.hub.errors import PushRefusedError
from hf_moe.hub.upload_files import checkpoint_folder, collect, kind_of

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
def test_what_is_left_out_says_why(name, reason, tmp_path):
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


def test_folders_are_left_out_and_named(tmp_path):
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


def test_an_empty_card_of_transformers_is_left_out(tmp_path):
    folder = model(tmp_path)
    (folder / "README.md").write_text("# Model\n" + "- **What:** [More Information Needed]\n" * 30)
    uploads, left = collect(folder)
    assert "README.md" not in {upload.path for upload in uploads}
    assert "empty template" in left[0].reason
    (folder / "README.md").write_text("# Mine\nstill to say: [More Information Needed]\n")
    assert "README.md" in sent(folder)


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
