"""Facts of a saved model or adapter: from its configs, the headers of its weights, the record of its routers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from hf_moe.hub.cards.facts import CardError, read_facts, take

_ROUTER_FIELDS = ("router_scoring", "routing", "norm_topk_prob", "router_aux_loss_coef", "num_shared_experts")
_ADAPTER_FIELDS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_parameters")
_CAUSAL_LM = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class CheckpointFacts:
    """None and empty where the folder does not say it.

    Of an adapter `total`, `active`, `layers`, `router`, `context`, `vocabulary`, `dtype` and the chat template are its
    base's.
    """

    name: str
    is_adapter: bool = False
    model_type: str | None = None
    model_class: str | None = None
    base_model: str | None = None
    base_is_local: bool = False
    dtype: str | None = None
    total: int | None = None
    active: int | None = None
    trained: int | None = None
    layers: tuple[str, ...] = ()
    num_moe_layers: int | None = None
    is_causal_lm: bool = True
    auto_class: str = "AutoModelForCausalLM"
    router: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    vocabulary: int | None = None
    saved_bytes: int | None = None
    router_sha256: str | None = None
    has_chat_template: bool = False

    @property
    def adapter_kind(self) -> str | None:
        """In words; None of a model, or where the adapter's config does not say it."""
        kind = self.adapter.get("peft_type") if self.is_adapter else None
        if kind == "LORA":  # experts are parameters, no modules
            return "expert LoRA" if self.adapter.get("target_parameters") else "LoRA"
        return "adapter experts" if kind == "ADAPTER_EXPERTS" else kind


def checkpoint_facts(folder: Path) -> CheckpointFacts:
    """Facts of a folder that `save_pretrained` wrote; of an adapter also those of its base, if that is at hand.

    No code of the checkpoint is run.

    Raises:
        CardError: If there is no such folder, it holds neither a model nor an adapter, or a config in it is damaged.
    """
    if not folder.is_dir():
        raise CardError(f"{str(folder)!r} is no folder. Name the folder of a saved model or adapter.")
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        parts = [part for part in ("model", "adapter") if (folder / part).is_dir()]
        way_out = f"Name its {' or '.join(parts)} folder." if parts else "Name what save_pretrained wrote."
        raise CardError(f"{str(folder)!r} holds neither config.json nor adapter_config.json. {way_out}")
    adapter = read_facts(folder / "adapter_config.json") if is_adapter else {}
    base = take(adapter, "base_model_name_or_path", str)
    local = None if base is None else _local(folder, base)
    source = (local or _cached(base, take(adapter, "revision", str))) if is_adapter else folder
    weights = sorted(folder.glob("*.safetensors"))
    return CheckpointFacts(
        name=folder.resolve().name,
        is_adapter=is_adapter,
        base_model=base,
        base_is_local=local is not None,
        trained=_count_parameters(weights) if is_adapter else None,
        adapter={key: adapter[key] for key in _ADAPTER_FIELDS if adapter.get(key) is not None},
        saved_bytes=sum(path.stat().st_size for path in weights) if weights else None,
        router_sha256=_router_hash(folder),
        has_chat_template=source is not None and _has_chat_template(source),
        **({} if source is None else _of_config(source)),
    )


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    return config.is_file() and bool(read_facts(config).get("chat_template"))


def _local(folder: Path, base: str) -> Path | None:
    """An adapter's base on this machine; a relative path may start at the adapter's folder."""
    paths = [] if "\0" in base else [Path(base), folder / base]
    return next((path for path in paths if (path / "config.json").is_file()), None)


def _cached(base: str | None, revision: str | None) -> Path | None:
    """The folder with a base's config in the Hub's cache. Nothing is downloaded."""
    try:
        cached = None if base is None else try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _of_config(folder: Path) -> dict[str, Any]:
    """From config.json; sizes from the model that it describes, built without storage."""
    from hf_moe.loading.auto_classes import whole_auto_class
    from hf_moe.loading.config_files import ConfigError, load_config
    from hf_moe.observability.explain import explain_config

    written = read_facts(folder / "config.json")
    architectures = [str(name) for name in take(written, "architectures", list) or []]
    facts: dict[str, Any] = {
        "model_type": take(written, "model_type", str),
        "context": take(written, "max_position_embeddings", int),
        "vocabulary": take(written, "vocab_size", int),
        "router": {key: written[key] for key in _ROUTER_FIELDS if written.get(key) is not None},
        "is_causal_lm": not architectures or any(name.endswith(_CAUSAL_LM) for name in architectures),
    }
    try:
        # False, not transformers' default, which asks on the terminal whether to run the checkpoint's code
        config = load_config(folder, trust_remote_code=False)
        found = explain_config(config)
    except ConfigError as error:
        raise CardError(str(error)) from error
    except (OSError, ValueError, ImportError):
        return facts  # a model that this transformers does not know: its sizes stay unknown
    return facts | {
        "auto_class": whole_auto_class(config).__name__,
        "model_class": found.model_class,
        "dtype": found.dtype,
        "total": found.total_parameters,
        "active": found.active_parameters,
        "num_moe_layers": sum(group.count for group in found.layers),
        "layers": tuple(
            f"{group.layers}: {group.num_experts} experts, top-{group.top_k}, width {group.expert_width}, hidden "
            f"{group.hidden_size}"
            for group in found.layers
        ),
    }


def _count_parameters(files: list[Path]) -> int | None:
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    count = 1
                    for size in file.get_slice(name).get_shape():
                        count *= size
                    total += count
    except SafetensorError:
        return None
    return total or None


def _router_hash(folder: Path) -> str | None:
    path = folder / "router_hash.json"
    return take(read_facts(path), "router_sha256", str) if path.is_file() else None
