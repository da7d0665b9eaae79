"""Pushes over HTTP: one commit holds all and leaves nothing old; what is refused is refused before it is sent."""

import json
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_moe.cli.push  # noqa: F401 (adds the command)
from hf_moe import expert_lora_config
from hf_moe.adapters.load_adapter import AdapterError, load_adapter
from hf_moe.cli.common import app
from hf_moe.hub import push, remote
from hf_moe.hub.errors import HubError, PushRefusedError
from tiny_hf_moe import make_code_old, random_ids
from tiny_models import build_tiny

from .conftest import save_tiny

both_paths = pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
ALICE, CAROL, BOB_READS = "hf_alice_write", "hf_carol_write", "hf_bob_read"


def push_all(api, folder, repo_id, **options):
    plan = push.plan_push(folder, repo_id, api=api, **options)
    return push.send(plan, api=api)


def states(plan) -> dict[str, str]:
    return {change.path: change.state for change in plan.changes}


def commits(hub) -> int:
    return sum("/commit/" in line["path"] for line in hub.log())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model, unsharded, with the files that come with one and files that do not."""
    folder = tmp_path_factory.mktemp("saved")
    save_tiny(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# mine\n")
    (folder / "results.json").write_text('{"score": 1}')
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"\x89PNG")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / ".tmpAbC").write_bytes(b"cut off")
    (folder / "checkpoint-5").mkdir()
    (folder / "notes.txt").write_text("to myself")
    return folder


@both_paths
def test_one_commit_holds_all_of_it_and_nothing_else(hub, saved):
    api, before = hub.api(), commits(hub)
    plan = push.plan_push(saved, "first", api=api, private=True)
    assert commits(hub) == before, "a plan sends nothing"
    pushed = push.send(plan, api=api)
    assert commits(hub) == before + 1
    info = api.model_info("alice/first")
    assert info.private
    assert info.sha == pushed.commit
    assert {file.rfilename for file in info.siblings} - {".gitattributes"} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "results.json", "plots/loss.png"),
        *("configuration_hf_moe.py", "modeling_hf_moe.py", "routing.py", "losses.py", "hub_upload.py"),
        *("checkpoint_files.py", "checkpoint_layout.py", "late_gradient.py", "shipped_code.py"),
        *("masks.py", "outputs.py", "transformers_names.py"),
    }
    left = {"training_args.bin", "optimizer.pt", ".tmpAbC", "notes.txt", "checkpoint-5"}
    assert {each.path for each in plan.left_out} == left
    assert push.verify(plan, pushed, api=api).startswith("loads as HfMoeForCausalLM")


def test_the_code_of_another_version_is_not_sent(hub, saved, tmp_path):
    """What the installed hf_moe would write is sent in its place; the folder stays as it is."""
    folder = shutil.copytree(saved, tmp_path / "old")
    text = make_code_old(folder)
    api = hub.api()
    plan = push.plan_push(folder, "renewed", api=api)
    reasons = {each.path: each.reason for each in plan.left_out}
    assert "this one's is sent instead" in reasons["modeling_hf_moe.py"]
    pushed = push.send(plan, api=api)
    downloaded = Path(api.hf_hub_download("alice/renewed", "modeling_hf_moe.py", revision=pushed.commit))
    assert downloaded.read_text() == (saved / "modeling_hf_moe.py").read_text()
    assert (folder / "modeling_hf_moe.py").read_text() == text
    names = {file.rfilename for file in api.model_info("alice/renewed").siblings}
    assert names >= {path.name for path in saved.glob("*.py")}


@both_paths
def test_what_is_there_is_not_sent_again(hub, saved):
    api = hub.api()
    push_all(api, saved, "alice/again")
    before = len(hub.log())
    plan = push.plan_push(saved, "alice/again", api=api)
    assert plan.is_empty
    assert push.send(plan, api=api).commit == api.model_info("alice/again").sha
    assert not [line for line in hub.log()[before:] if line["method"] != "GET"]


@pytest.mark.parametrize(
    ("hub", "sizes"),
    [("lfs", ("1GB", "20KB")), ("xet", ("1GB", "20KB")), ("lfs", ("20KB", "1GB")), ("lfs", ("20KB", "60KB"))],
    indirect=["hub"],
    ids=str,
)
def test_other_shards_leave_no_old_weights(hub, sizes, tmp_path):
    """Beside new shards transformers loads an old model.safetensors without a warning."""
    api, repo = hub.api(), f"alice/shards-{'-'.join(sizes)}"
    for seed, size in enumerate(sizes):
        model = save_tiny(tmp_path / size, seed=seed, max_shard_size=size)
        push_all(api, tmp_path / size, repo)
    names = {file.rfilename for file in api.model_info(repo).siblings}
    stored = {name for name in names if "safetensors" in name}
    assert stored == {path.name for path in (tmp_path / sizes[1]).glob("*safetensors*")}
    loaded = AutoModelForCausalLM.from_pretrained(api.snapshot_download(repo, cache_dir=tmp_path / "cache"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_old_results_go_and_what_others_wrote_stays(hub, saved, tmp_path):
    api = hub.api()
    push_all(api, saved, "alice/results")
    api.upload_file(path_or_fileobj=b"hello", path_in_repo="demo.py", repo_id="alice/results")
    api.upload_file(path_or_fileobj=b"x: 1", path_in_repo=".eval_results/old.yaml", repo_id="alice/results")
    save_tiny(tmp_path, seed=1)
    plan = push.plan_push(tmp_path, "results", api=api)
    found = states(plan)
    assert {path for path, state in found.items() if state == "deleted"} == {"results.json", ".eval_results/old.yaml"}
    assert found["model.safetensors"] == "changed"
    assert found["config.json"] == "unchanged"
    push.send(plan, api=api)
    names = {file.rfilename for file in api.model_info("alice/results").siblings}
    assert {"demo.py", "README.md", "plots/loss.png"} <= names
    assert "# alice/results" in Path(api.hf_hub_download("alice/results", "README.md", cache_dir=tmp_path)).read_text()
    assert not {"results.json", ".eval_results/old.yaml"} & names


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A native base and expert LoRA on it, whose config names the base's folder."""
    folder = tmp_path_factory.mktemp("native")
    base, _ = build_tiny("olmoe")
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, expert_lora_config(base, r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder / "adapter")
    return folder, model.eval()


@both_paths
def test_an_adapter_is_pushed_on_its_public_base(hub, adapter, tmp_path, monkeypatch):
    folder, model = adapter
    api = hub.api()
    with pytest.raises(PushRefusedError, match=r"as the base, which nobody else has.*--base owner/name"):
        push.plan_push(folder / "adapter", "alice/adapter", api=api)
    push_all(api, folder / "base", "alice/base")
    pushed = push_all(api, folder / "adapter", "alice/adapter", base="alice/base")
    found = Path(api.snapshot_download("alice/adapter", revision=pushed.commit, cache_dir=tmp_path))
    assert json.loads((found / "adapter_config.json").read_text())["base_model_name_or_path"] == "alice/base"
    card = ModelCard.load(found / "README.md")
    assert card.data.base_model == "alice/base", "PEFT's empty template is no card; one is written"
    assert str(folder) not in card.content
    assert "alice/adapter" in card.content
    base = AutoModelForCausalLM.from_pretrained(api.snapshot_download("alice/base", cache_dir=tmp_path))
    tuned = PeftModel.from_pretrained(base, str(found)).eval()
    ids = random_ids() % model.config.vocab_size
    assert torch.equal(tuned(ids).logits, model(ids).logits)
    base = tuned.unload()
    by_name = partial(huggingface_hub.snapshot_download, endpoint=hub.url, token=ALICE, cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", by_name)
    monkeypatch.setattr("hf_moe.loading.pretrained.HfApi", hub.api)
    loaded = load_adapter(base, "alice/adapter", revision=pushed.commit, accelerate=False)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    with pytest.raises(AdapterError, match="alice/adapter has no branch, tag or commit 'v9'"):
        load_adapter(base, "alice/adapter", revision="v9")
    with pytest.raises(AdapterError, match="no folder here is called 'alice/none', and the Hub has none"):
        load_adapter(base, "alice/none")


def test_model_and_adapter_do_not_share_a_repository(hub, adapter):
    folder, _ = adapter
    api = hub.api()
    push_all(api, folder / "base", "alice/alone")
    with pytest.raises(PushRefusedError, match=r"holds a model \(config.json\), and this is an adapter"):
        push.plan_push(folder / "adapter", "alice/alone", api=api, base="alice/alone")


def test_a_branch_starts_from_the_default_one(hub, saved, tmp_path):
    api = hub.api()
    push_all(api, saved, "alice/branches")
    main = api.model_info("alice/branches").sha
    save_tiny(tmp_path, seed=3, max_shard_size="20KB")
    plan = push.plan_push(tmp_path, "alice/branches", api=api, revision="tuned")
    assert plan.new_branch
    assert states(plan)["model.safetensors"] == "deleted"
    pushed = push.send(plan, api=api)
    assert api.model_info("alice/branches").sha == main
    assert api.model_info("alice/branches", revision="tuned").sha == pushed.commit
    again = push.plan_push(tmp_path, "alice/branches", api=api, revision="tuned")
    assert again.is_empty
    assert not again.new_branch


def test_a_pull_request_by_somebody_else(hub, saved, tmp_path):
    owner, other = hub.api(), hub.api(CAROL)
    push_all(owner, saved, "alice/open")
    main = owner.model_info("alice/open").sha
    save_tiny(tmp_path, seed=4)
    pushed = push_all(other, tmp_path, "alice/open", create_pr=True)
    assert pushed.url.endswith("/discussions/1")
    assert owner.model_info("alice/open").sha == main
    assert owner.model_info("alice/open", revision="refs/pr/1").sha == pushed.commit
    shutil.copytree(saved, tmp_path / "same")
    again = push.plan_push(tmp_path / "same", "alice/open", api=other, create_pr=True)
    assert again.is_empty
    assert push.send(again, api=other).commit == main, "the client gives the URL of a commit, as if it were a new one"
    assert owner.model_info("alice/open", revision="refs/pr/1").sha == pushed.commit
    with pytest.raises(PushRefusedError, match="does not exist: there is nothing to open a pull request against"):
        push.plan_push(tmp_path, "alice/no-such", api=other, create_pr=True)


def test_no_public_repository_where_a_private_one_is_asked_for(hub, saved):
    api = hub.api()
    push_all(api, saved, "alice/public")
    with pytest.raises(PushRefusedError, match="exists and is public"):
        push.plan_push(saved, "alice/public", api=api, private=True)


def test_what_the_hub_refuses_is_one_line_with_the_way_out(hub, saved, tmp_path):
    api = hub.api()
    push_all(api, saved, "alice/secret", private=True)
    push_all(api, saved, "alice/gate")
    save_tiny(tmp_path, seed=5)
    refused = {
        "somebody else's private": (CAROL, "alice/secret", "may not write to alice/secret .*rights to create a model"),
        "reader": (BOB_READS, "alice/gate", "this token may not write to alice/gate .*--create-pr"),
        "unknown token": ("hf_nobody_knows", "alice/gate", "does not accept the token .*hf auth login"),
        "no token": (False, "alice/gate", "there is no token.*hf auth login"),
        "no token for a new one": (False, "alice/none", "there is no token.*hf auth login"),
        "no name": (ALICE, "a b/c", "is no name of a repository"),
        "somebody else's space": (ALICE, "carol/new", "may not write to carol/new"),
    }
    for token, repo, words in refused.values():
        with pytest.raises(HubError, match=words) as error:
            push_all(hub.api(token), tmp_path, repo)
        assert str(token) not in str(error.value)
        assert "\n" not in str(error.value)
    api.update_repo_settings("alice/gate", gated="auto")
    plan = push.plan_push(tmp_path, "alice/gate", api=api)
    pushed = push.send(plan, api=api)
    for token in (CAROL, False):
        with pytest.raises(HubError, match="alice/gate is gated and this account has no access"):
            push.verify(plan, pushed, api=hub.api(token))


@both_paths
def test_a_commit_in_between_stops_the_push(hub, saved, tmp_path):
    api = hub.api()
    push_all(api, saved, "alice/busy")
    save_tiny(tmp_path, seed=6)
    plan = push.plan_push(tmp_path, "alice/busy", api=api)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="other.txt", repo_id="alice/busy")
    head = api.model_info("alice/busy").sha
    with pytest.raises(HubError, match=r"alice/busy was changed after its files were compared.*same command again"):
        push.send(plan, api=api)
    assert api.model_info("alice/busy").sha == head
    objects = sum(path.stat().st_size for path in hub.root.rglob("*") if path.is_file())
    push_all(api, tmp_path, "alice/busy")
    grown = sum(path.stat().st_size for path in hub.root.rglob("*") if path.is_file()) - objects
    assert grown < 20_000, "the weights were sent again"


def test_a_server_that_is_not_there(saved, online):
    from huggingface_hub import HfApi

    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        push.plan_push(saved, "alice/x", api=HfApi(endpoint="http://127.0.0.1:9", token=ALICE))


def test_nothing_is_sent_of_a_folder_that_does_not_load(hub, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(PushRefusedError, match=r"does not load back: .*bytes are missing at its end") as error:
        push.plan_push(folder, "alice/cut", api=hub.api())
    assert str(weights) in str(error.value)
    assert not hub.api().repo_exists("alice/cut")


@pytest.mark.parametrize("outside", ["../outside.safetensors", "{parent}/outside.safetensors"])
def test_weights_that_are_not_sent_are_not_there(hub, adapter, tmp_path, outside):
    """Of a native model, which transformers loads from here without a warning."""
    folder, _ = adapter
    shutil.copytree(folder / "base", tmp_path / "model")
    shutil.move(tmp_path / "model" / "model.safetensors", tmp_path / "outside.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), outside.format(parent=tmp_path))
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(PushRefusedError, match=r"does not load back: .*must be a plain file name"):
        push.plan_push(tmp_path / "model", "alice/outside", api=hub.api())


def test_a_byte_that_changed_on_the_way_is_found(hub, saved):
    """The client itself compares no more than the size."""
    api = hub.api()
    plan = push.plan_push(saved, "alice/flipped", api=api)
    pushed = push.send(plan, api=api)
    stored = hub.root / "lfs" / remote.sha256(saved / "model.safetensors")
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    try:
        with pytest.raises(PushRefusedError, match=r"model.safetensors of alice/flipped at .* is not what was sent"):
            push.verify(plan, pushed, api=api)
    finally:
        shutil.copyfile(saved / "model.safetensors", stored)  # other tests push the same model


def test_nothing_is_sent_with_a_token_in_it(hub, saved, tmp_path):
    for number, text in enumerate(("hf_" + "a1B2" * 9, f"token={ALICE}")):
        folder = shutil.copytree(saved, tmp_path / str(number))
        (folder / "results.json").write_text(json.dumps({"note": text}))
        with pytest.raises(PushRefusedError, match=r"results.json holds an access token") as error:
            push.plan_push(folder, "alice/token", api=hub.api())
        assert text not in str(error.value)


def test_the_command(hub, saved, monkeypatch):
    monkeypatch.setattr("hf_moe.hub.push.HfApi", hub.api)  # the environment is read at import
    run = CliRunner().invoke
    dry = run(app, ["push", str(saved), "alice/command", "--dry-run", "--private"])
    assert dry.exit_code == 0, dry.output
    for words in ("new private repository", "model.safetensors", "training_args.bin", "nothing was sent", "loads as"):
        assert words in dry.output
    assert not hub.api().repo_exists("alice/command")
    done = run(app, ["push", str(saved), "alice/command", "--verify"])
    assert done.exit_code == 0, done.output
    assert "downloaded and compared" in done.output
    assert hub.api().model_info("alice/command").sha in done.output
    assert ALICE not in dry.output + done.output
    assert "everything was there already" in run(app, ["push", str(saved), "alice/command"]).output
    assert run(app, ["push", str(saved / "plots"), "alice/command"]).exit_code == 2
