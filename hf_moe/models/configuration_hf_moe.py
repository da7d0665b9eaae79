"""Configuration of the `hf_moe` architecture. Every value is checked when the configuration is built."""

import difflib
import inspect
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Above these a configuration is a mistake or an attack: building it would exhaust any machine.
MAX_EXPERTS = 65_536
MAX_LAYERS = 1_024
MAX_LABELS = 131_072
MAX_CONTEXT = 2**31
MAX_PARAMETERS = 2**43
ALLOW_HUGE = "HF_MOE_ALLOW_HUGE"

# Names of the number of experts, whatever the family
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# What makes a configuration, or the model of it, grow by one number or one list: also in native families
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth")
_BY_LAYER = ("mlp_only_layers", "layer_types", "mlp_layer_types", "per_layer_config")
_LIMITS = {
    **dict.fromkeys(("num_labels", "id2label", "label2id"), MAX_LABELS),
    **dict.fromkeys((*_LAYERS, "num_encoder_layers", "num_decoder_layers", *_BY_LAYER), MAX_LAYERS),
    **dict.fromkeys(EXPERT_COUNTS, MAX_EXPERTS),
}

# transformers drops these from a configuration silently
_GENERATION_NAMES = {"top_k": "num_experts_per_tok", "top_p": "router_top_p"}
# Names of these may be repositories of the Hub, whose code then runs
_IMPLEMENTATIONS = {"attn_implementation", "experts_implementation"}
# What `per_layer_config` may change: the residual stream and the routing mode are one for the model
_PER_LAYER = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts"}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)
_NOT_NEGATIVE = ("num_shared_experts", "num_null_experts", "first_k_dense_replace")
# Larger factors leave the range of half precision
_LARGEST_FACTOR = 1e4
_FINITE_NOT_NEGATIVE = ("router_aux_loss_coef", "router_z_loss_coef", "initializer_range")
_FINITE_POSITIVE = ("rms_norm_eps", "routed_scaling_factor")
# Beyond these a rotation is no number in float32
_ROPE_RANGE = (1e-6, 1e12)
_FRACTIONS = ("attention_dropout", "classifier_dropout", "router_jitter_noise")


@strict
class HfMoeConfig(PreTrainedConfig):
    """Configuration of a sparse Mixture-of-Experts decoder (or encoder, with `is_causal=False`).

    The defaults describe a 7B model with 1B active parameters (64 experts, top-8). A feed-forward layer is dense when
    its index is below `first_k_dense_replace` or in `mlp_only_layers`; `per_layer_config` (of transformers) gives
    layers their own `num_experts`, `num_experts_per_tok` or `moe_intermediate_size`.

    Args:
        intermediate_size: Width of a dense feed-forward layer.
        moe_intermediate_size: Width of one expert; shared experts form one MLP of `num_shared_experts` times it.
        head_dim: Size of an attention head; `hidden_size // num_attention_heads` when not given.
        use_qk_norm: RMSNorm over the head dimension of queries and keys, as in Qwen3.
        sliding_window: Tokens an attention layer looks back, itself included; all when `None`.
        is_causal: `False` makes every token attend to all others: an encoder.
        num_experts_per_tok: Experts per token; with `routing="top_p"` the cap on their number.
        router_scoring: `"softmax"` or `"sigmoid"` over the router logits.
        routing: `"top_k"`; `"top_p"`, the fewest experts whose probabilities reach `router_top_p`; `"dense"`, all
            experts blended; `"expert_choice"`, experts choose tokens (encoders only: it looks at later tokens).
        norm_topk_prob: Divide the weights of a token's chosen experts by their sum.
        routed_scaling_factor: Multiplies the routing weights.
        n_group: Groups of consecutive experts; only the best `topk_group` are open to a token (DeepSeek-V2/V3).
        router_bias: Keep a bias per expert that shifts the choice and never the weight (`e_score_correction_bias`,
            arXiv:2408.15664).
        num_null_experts: Experts without parameters that add nothing: a token that chooses them computes less
            (arXiv:2406.13233).
        capacity_factor: In training, an expert takes at most `ceil(capacity_factor * tokens * num_experts_per_tok /
            num_experts)` assignments; `None` drops nothing.
        drop_policy: What an overfull expert keeps: `"position"`, the first assignments; `"probability"`, the heaviest.
        router_jitter_noise: In training, the router sees its input times uniform noise in `[1 - noise, 1 + noise]`.
        router_aux_loss_coef: Weight of the load balancing loss in the training loss; 0 leaves it out.
        router_z_loss_coef: Weight of the router z-loss (arXiv:2202.08906) in the training loss; 0 leaves it out.
        balance_scope: `"layer"` balances each micro-batch; `"global_batch"` the whole optimizer step over all
            processes (arXiv:2501.11873). Both balance each layer on its own.
        output_router_logits: Return the router logits, and the balancing loss in evaluation too.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A value has the wrong type or breaks a rule (a `ValueError`
            or `TypeError` is its cause).
    """

    model_type = "hf_moe"
    _auto_class = "AutoConfig"  # saved checkpoints carry this file
    keys_to_ignore_at_inference = ["cache", "past_key_values", "router_logits", "aux_loss", "z_loss"]  # noqa: RUF012
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {  # noqa: RUF012
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 8192
    moe_intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    use_qk_norm: bool = True
    sliding_window: int | None = None
    is_causal: bool = True
    num_experts: int = 64
    num_experts_per_tok: int = 8
    router_scoring: Literal["softmax", "sigmoid"] = "softmax"
    routing: Literal["top_k", "top_p", "dense", "expert_choice"] = "top_k"
    router_top_p: float = 0.9
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_bias: bool = False
    num_shared_experts: int = 0
    first_k_dense_replace: int = 0
    mlp_only_layers: list[int] | None = None
    num_null_experts: int = 0
    capacity_factor: float | int | None = None
    drop_policy: Literal["position", "probability"] = "position"
    router_jitter_noise: float | int = 0.0
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    balance_scope: Literal["layer", "global_batch"] = "layer"
    output_router_logits: bool = False
    classifier_dropout: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        refuse_huge(config_dict)  # before each entry of a list is looked at
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any):
        refuse_huge({**vars(self), **kwargs})
        self._refuse_misspelt(kwargs)
        self._refuse_unknown_dtype(self.dtype if self.dtype is not None else kwargs.get("torch_dtype"))
        self._refuse_foreign_code(kwargs)
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        # transformers reads head_dim; a zero is reported by the checks, which run later
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self._head_dim()
        self._refuse_rope(kwargs)
        self._refuse_unusable(kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def _refuse_misspelt(cls, kwargs: dict[str, Any]) -> None:
        """Refuse keywords, which transformers keeps as attributes: one that shadows a method, the table of checks or a
        constant of the class is an attack, and one that nearly is a field is a mistake."""
        fields = cls.__dataclass_fields__
        for key in kwargs:
            if key in _GENERATION_NAMES:
                raise ValueError(f"{key!r} is a generation parameter; the field is {_GENERATION_NAMES[key]!r}.")
            if callable(getattr(cls, key, None)):
                raise ValueError(
                    f"{key!r} is a method of {cls.__name__} and cannot be a configuration value; remove it."
                )
            if key == "model_type":  # in every config.json
                continue
            if hasattr(cls, key) and getattr(inspect.getattr_static(cls, key), "fset", None) is None:
                raise ValueError(
                    f"{key!r} is a constant of {cls.__name__} and cannot be a configuration value; remove it."
                )
            if hasattr(cls, key) or key.startswith("_"):
                continue
            if near := difflib.get_close_matches(key, fields, n=1, cutoff=0.85):
                raise ValueError(f"{cls.__name__} has no field {key!r}. Did you mean {near[0]!r}?")

    @staticmethod
    def _refuse_foreign_code(kwargs: dict[str, Any]) -> None:
        """A config file must not choose code from the Hub; only the caller may (CVE-2026-4372)."""
        for key, value in kwargs.items():
            if key.strip("_").removesuffix("_internal") in _IMPLEMENTATIONS and "/" in str(value):
                raise ValueError(
                    f"{key} must name an implementation that is registered here, got {value!r:.80}, code from the "
                    "Hub. Pass attn_implementation or experts_implementation to from_pretrained if you trust it."
                )

    @staticmethod
    def _refuse_unknown_dtype(dtype: Any) -> None:
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must name a torch dtype such as 'bfloat16', got {dtype!r:.80}.")

    def _refuse_unusable(self, kwargs: dict[str, Any]) -> None:
        """Refuse what transformers accepts here and fails on later, in a traceback."""
        if self.return_dict is False:
            raise ValueError(
                "return_dict must be true: the model reads its backbone's outputs by name. For a tuple, pass "
                "return_dict=False to the forward."
            )
        auto_map = kwargs.get("auto_map")
        values = auto_map.values() if isinstance(auto_map, dict) else () if auto_map is None else [auto_map]
        names = [name for value in values for name in (value if isinstance(value, list) else [value])]
        if wrong := [name for name in names if name is not None and not isinstance(name, str)]:
            raise ValueError(f"auto_map must map Auto classes to 'module.Class', got {wrong[0]!r:.80}.")
        labels = kwargs.get("num_labels")
        if isinstance(labels, int) and labels < 0:
            raise ValueError(f"num_labels must not be negative, got {labels}.")
        if (padding := self.pad_token_id) is not None and not -self.vocab_size <= padding < self.vocab_size:
            raise ValueError(f"pad_token_id must be below vocab_size ({self.vocab_size}), got {padding!r:.80}.")

    def _refuse_rope(self, kwargs: dict[str, Any]) -> None:
        """Check rotary values, of which transformers checks some with the model and some never: NaN logits."""
        found = kwargs.get("rope_scaling") or self.rope_parameters or {}
        if not isinstance(found, dict):  # refused by its type
            return
        kind = found.get("rope_type", found.get("type", "default"))
        known = ("default", *ROPE_INIT_FUNCTIONS)
        if kind not in known:
            raise ValueError(f"rope_parameters: rope_type must be one of {', '.join(known)}, got {kind!r:.80}.")
        named = {key: kwargs[key] for key in ("rope_theta", "partial_rotary_factor") if key in kwargs} | found
        for key, value in named.items():
            if key not in ("rope_type", "type", "truncate") and (value is not None or key == "rope_theta"):
                _require_rope_numbers(key, value)
        span, share = found.get("original_max_position_embeddings") or 2, named.get("partial_rotary_factor") or 1
        _require(span >= 2, "original_max_position_embeddings", span, "must be at least 2")
        _require(share <= 1, "partial_rotary_factor", share, "must be at most 1")
        if kind == "longrope" and self.head_dim:
            half = int(self.head_dim * share) // 2
            for name in ("short_factor", "long_factor"):
                count = len(found[name]) if isinstance(found.get(name), list) else 0
                _require(count == half, name, count, f"must have {half} numbers, half of the rotated size of a head")

    def validate_rope(self) -> None:
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters: {error.args[0]}.") from error

    def is_moe_layer(self, layer_idx: int) -> bool:
        """True if the feed-forward of layer `layer_idx` is a MoE layer; the others are dense."""
        return layer_idx >= self.first_k_dense_replace and layer_idx not in (self.mlp_only_layers or ())

    def require_causal(self, model: str) -> None:
        """Raise ValueError if attention is not causal, for the model of this name, which decodes."""
        if not self.is_causal:
            raise ValueError(
                f"{model} decodes causally and needs is_causal=True, got is_causal=False with "
                f"routing={self.routing!r}. For an encoder use HfMoeModel or a classification head; for a language "
                "model choose routing='top_k', 'top_p' or 'dense'."
            )

    @property
    def can_skip_slots(self) -> bool:
        """True if a token may use fewer experts than it has slots: the router then emits the id `num_experts`."""
        return (
            self.routing in ("top_p", "expert_choice") or self.num_null_experts > 0 or self.capacity_factor is not None
        )

    def validate_architecture(self) -> None:
        """Check all values against each other; transformers calls this once the fields are set, each model again."""
        self._validate_layers()
        self._validate_sizes()
        self._validate_numbers()
        self._validate_attention()
        self._validate_routing()
        self._validate_memory()

    def _validate_sizes(self) -> None:
        for config in self._distinct_layer_configs():
            for name in _POSITIVE:
                _require(getattr(config, name) >= 1, name, getattr(config, name), "must be at least 1")
            for name in _NOT_NEGATIVE:
                _require(getattr(config, name) >= 0, name, getattr(config, name), "must not be negative")
            for name in ("num_experts", "num_null_experts"):
                value = getattr(config, name)
                _require(value <= MAX_EXPERTS, name, value, f"must be at most {MAX_EXPERTS}")
        for name in ("head_dim", "sliding_window"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be at least 1 or None")
        for name in ("sliding_window", "max_position_embeddings"):
            value = getattr(self, name)
            _require(value is None or value <= MAX_CONTEXT, name, value, f"must be at most {MAX_CONTEXT}")

    def _validate_numbers(self) -> None:
        for name in _FINITE_NOT_NEGATIVE:
            value = getattr(self, name)
            rule = f"must be finite and not negative, at most {_LARGEST_FACTOR:,.0f}"
            _require(0 <= value <= _LARGEST_FACTOR, name, value, rule)
        for name in _FINITE_POSITIVE:
            value = getattr(self, name)
            rule = f"must be finite and positive, at most {_LARGEST_FACTOR:,.0f}"
            _require(0 < value <= _LARGEST_FACTOR, name, value, rule)
        for name in _FRACTIONS:
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "must be in [0, 1)")
        _require(0 < self.router_top_p <= 1, "router_top_p", self.router_top_p, "must be in (0, 1]")
        capacity = self.capacity_factor
        _require(
            capacity is None or 0 < capacity <= _LARGEST_FACTOR,
            "capacity_factor",
            capacity,
            f"must be finite and positive, at most {_LARGEST_FACTOR:,.0f}, or None to drop nothing",
        )

    def _validate_attention(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        _require(
            heads % groups == 0,
            "num_key_value_heads",
            groups,
            f"must divide num_attention_heads ({heads})",
        )
        head_dim = self._head_dim()
        _require(head_dim % 2 == 0, "head_dim", head_dim, "must be even (rotary embedding rotates pairs)")
        # imported here: it costs as much as the rest of `import hf_moe`
        from transformers.activations import ACT2FN

        _require(
            self.hidden_act in ACT2FN, "hidden_act", self.hidden_act, "must be an activation that transformers knows"
        )

    def _validate_layers(self) -> None:
        for name in (self.per_layer_attributes or set()) - _PER_LAYER:
            raise ValueError(f"per_layer_config may change {sorted(_PER_LAYER)}, not {name!r}.")
        for index in self.mlp_only_layers or ():
            _require(
                isinstance(index, int) and 0 <= index < self.num_hidden_layers,
                "mlp_only_layers",
                index,
                f"must hold layer indices below num_hidden_layers ({self.num_hidden_layers})",
            )

    def _validate_routing(self) -> None:
        for config in self._distinct_layer_configs():
            experts, chosen = config.num_experts, config.num_experts_per_tok
            _require(
                chosen <= experts + config.num_null_experts,
                "num_experts_per_tok",
                chosen,
                f"must be in [1, {experts + config.num_null_experts}] (num_experts plus num_null_experts); "
                "lower it or add experts",
            )
            config._validate_groups()
        self._validate_combinations()
        if self.routing == "expert_choice" and self.is_causal:
            raise ValueError(
                "routing='expert_choice' lets later tokens decide an earlier token's experts and so cannot decode "
                "causally: pass is_causal=False and use_cache=False for an encoder, or choose routing='top_k'."
            )
        if self.use_cache and not self.is_causal:
            raise ValueError("use_cache=True needs causal attention: pass use_cache=False with is_causal=False.")

    def _validate_groups(self) -> None:
        experts, groups, kept = self.num_experts, self.n_group, self.topk_group
        _require(experts % groups == 0, "n_group", groups, f"must divide num_experts ({experts})")
        _require(kept <= groups, "topk_group", kept, f"must be in [1, {groups}] (n_group)")
        if groups == 1:
            return
        size = experts // groups
        _require(
            self.num_experts_per_tok <= kept * size,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"must be at most the {kept * size} experts of topk_group={kept} groups of {size}",
        )
        if self.router_scoring == "sigmoid":
            _require(
                size >= 2, "n_group", groups, "must leave 2 experts a group: sigmoid groups are ranked by their best 2"
            )

    def _validate_combinations(self) -> None:
        """Options that only some routing modes can honour: refused elsewhere, never ignored."""
        only_top_k = {"n_group": self.n_group > 1, "router_bias": self.router_bias}
        only_top_k["num_null_experts"] = self.num_null_experts > 0
        for name, is_set in only_top_k.items():
            _require(
                not is_set or self.routing == "top_k",
                name,
                getattr(self, name),
                "works with routing='top_k' only; unset it",
            )
        _require(
            self.num_null_experts == 0 or self.n_group == 1,
            "num_null_experts",
            self.num_null_experts,
            "cannot be combined with n_group > 1 (null experts belong to no group)",
        )
        _require(
            self.routing != "top_p" or self.router_scoring == "softmax",
            "router_scoring",
            self.router_scoring,
            "must be 'softmax' with routing='top_p', which adds up probabilities",
        )
        _require(
            self.routing != "dense" or self.capacity_factor is None,
            "capacity_factor",
            self.capacity_factor,
            "must be None with routing='dense', where every expert takes every token",
        )

    def _validate_memory(self) -> None:
        count = self._count_parameters()
        if count <= MAX_PARAMETERS or os.environ.get(ALLOW_HUGE) == "1":
            return
        first = self._distinct_layer_configs()[0]
        raise ValueError(
            f"This configuration has about {count:.2e} parameters ({2 * count / 2**40:,.0f} TiB in bfloat16), more "
            f"than {MAX_PARAMETERS:.1e}. Check num_experts={first.num_experts}, hidden_size={self.hidden_size}, "
            f"moe_intermediate_size={first.moe_intermediate_size}, num_hidden_layers={self.num_hidden_layers}, "
            f"vocab_size={self.vocab_size}; if they are meant, set the environment variable {ALLOW_HUGE}=1."
        )

    def _count_parameters(self) -> int:
        """Parameters of the decoder, norms left out."""
        hidden = self.hidden_size
        attention = 2 * hidden * self._head_dim() * (self.num_attention_heads + self.num_key_value_heads)
        total = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        layer = max(
            3 * hidden * config.moe_intermediate_size * (config.num_experts + config.num_shared_experts)
            + hidden * (config.num_experts + config.num_null_experts)
            for config in self._distinct_layer_configs()
        )
        return total + self.num_hidden_layers * (attention + max(layer, 3 * hidden * self.intermediate_size))

    def _head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    def _distinct_layer_configs(self) -> list["HfMoeConfig"]:
        return list(self.per_layer_config) if self.is_heterogeneous else [self]


def refuse_huge(config: Mapping[str, Any]) -> None:
    """Refuse numbers and lists of a config, of any family, that take memory and time as soon as it is built.

    Raises:
        ValueError: Naming field, value and limit.
    """
    if os.environ.get(ALLOW_HUGE) == "1":
        return
    for name, limit in _LIMITS.items():
        value = config.get(name)
        size = len(value) if isinstance(value, list | dict) else value
        if isinstance(size, int | float) and not size <= limit:
            what = "have at most {:,} entries" if isinstance(value, list | dict) else "be at most {:,}"
            raise ValueError(
                f"{name} must {what.format(limit)}, got {size!r:.80}. If it is meant, set the environment variable "
                f"{ALLOW_HUGE}=1."
            )


def _require_rope_numbers(name: str, value: Any) -> None:
    least, most = _ROPE_RANGE
    is_list = isinstance(value, list) and name in ("short_factor", "long_factor")
    for number in value if is_list else [value]:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not least <= number <= most:
            rule = f"must be a number from {least:g} to {most:g}"
            raise ValueError(f"rope_parameters: {name} {rule}, got {number!r:.80}.")


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}, got {value!r:.200}.")


__all__ = ["HfMoeConfig"]
