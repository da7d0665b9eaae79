"""What a saved model or adapter says of itself: its configs, the headers of its weights, the record of its routers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_moe.hub.facts import CardError, read_facts, take

_ROUTER_FIELDS = ("router_scoring", "routing", "norm_topk_prob", "router_aux_loss_coef", "num_shared_experts")


@dataclass(frozen=True)
class CheckpointFacts:
    """None and empty where the folder does not say it."""

    name: str
    is_adapter: bool = False
    model_type: str | None = None
    model_class: str | None = None
    base_model: str | None = None
    dtype: str | None = None
    total: int | None = None
    active: int | None = None
    trained: int | None = None
    layers: tuple[str, ...] = ()
    router: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    vocabulary: int | None = None
    saved_bytes: int | None = None
    router_sha256: str | None = None
    has_code: bool = False
    has_tokenizer: bool = False


def checkpoint_facts(folder: Path) -> CheckpointFacts:
    """Facts of a folder that `save_pretrained` wrote; of an adapter also those of its base, if that is at hand.

    Raises:
        CardError: If there is no such folder, or a config in it is damaged.
    """
    if not folder.is_dir():
        raise CardError(f"{str(folder)!r} is no folder. Name the folder of a saved model or adapter.")
    is_adapter = (folder / "adapter_config.json").is_file()
    adapter = read_facts(folder / "adapter_config.json") if is_adapter else {}
    base = take(adapter, "base_model_name_or_path", str)
    source = folder if not is_adapter else None if base is None else Path(base)
    known = {} if source is None or not (source / "config.json").is_file() else _of_config(source)
    weights = sorted(folder.glob("*.safetensors"))
    return CheckpointFacts(
        name=folder.resolve().name,
        is_adapter=is_adapter,
        base_model=base,
        trained=_count_parameters(weights) if is_adapter else None,
        adapter={key: adapter[key] for key in ("peft_type", "r", "lora_alpha", "lora_dropout") if key in adapter},
        saved_bytes=sum(path.stat().st_size for path in weights) if weights else None,
        router_sha256=_router_hash(folder),
        has_code=any(folder.glob("modeling_*.py")),
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        **known,
    )


def _of_config(folder: Path) -> dict[str, Any]:
    """From config.json; sizes from the model that it describes, built without storage."""
    from hf_moe.observability.explain import explain_config

    config = read_facts(folder / "config.json")
    facts: dict[str, Any] = {
        "model_type": take(config, "model_type", str),
        "context": take(config, "max_position_embeddings", int),
        "vocabulary": take(config, "vocab_size", int),
        "router": {key: config[key] for key in _ROUTER_FIELDS if config.get(key) is not None},
    }
    try:
        found = explain_config(str(folder))
    except (OSError, ValueError, ImportError, KeyError):
        return facts  # a model that this transformers does not know: its sizes stay unknown
    return facts | {
        "model_class": found.model_class,
        "dtype": found.dtype,
        "total": found.total_parameters,
        "active": found.active_parameters,
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
