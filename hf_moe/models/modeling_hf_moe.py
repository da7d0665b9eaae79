"""The `hf_moe` architecture. A forward pass reads top to bottom: router, experts, block, decoder layer, model, heads.

Attention, norms and rotary embedding are Qwen3-MoE's, so that fixes of transformers arrive here; what is ours is the
MoE. All modules are in one file, as in transformers: it looks for the experts' decorator in the file of the model
class, and saved checkpoints carry the file, with the functions and records that it imports.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeMLP,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checkpoint_layout import VerifiedCheckpointMixin, register_conversion_mapping
from .configuration_hf_moe import HfMoeConfig
from .hub_upload import OneCommitPushMixin
from .late_gradient import LateGradient, attach_late_gradients
from .losses import GlobalBatchCounts, balancing_losses, share_of_step
from .masks import CACHE, last_token, layer_mask, token_mask
from .outputs import (
    HfMoeCausalLMOutputWithPast,
    HfMoeModelOutputWithPast,
    HfMoeQuestionAnsweringModelOutput,
    HfMoeSequenceClassifierOutputWithPast,
    HfMoeTokenClassifierOutput,
)
from .routing import RouterOutput, expert_capacity, pack_assignments, route
from .transformers_names import one_cache, refuse_unread


class HfMoeAttention(Qwen3MoeAttention):
    """Grouped-query attention; `use_qk_norm=False` leaves out the norm of queries and keys."""

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = config.is_causal
        if not config.use_qk_norm:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()


class HfMoeMLP(Qwen3MoeMLP):
    """Dense gated MLP: a dense layer, or the shared experts as one."""


class HfMoeRMSNorm(Qwen3MoeRMSNorm):
    """RMSNorm in float32."""


class HfMoeRotaryEmbedding(Qwen3MoeRotaryEmbedding):
    """Rotary position embedding, with all `rope_parameters` of transformers."""


class HfMoeRouter(nn.Module):
    """Scores the experts for each token and chooses; computes in float32 (float64 for float64 input).

    The weight is a bare parameter, not a Linear: adapters that target every Linear leave it alone.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.top_k = config.num_experts if config.routing in ("dense", "expert_choice") else config.num_experts_per_tok
        num_choices = config.num_experts + config.num_null_experts
        self.weight = nn.Parameter(torch.empty(num_choices, config.hidden_size))
        bias = torch.zeros(num_choices, dtype=torch.float32) if config.router_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> RouterOutput:
        """Route tokens.

        Args:
            hidden_states: `[T, H]` (leading dimensions are flattened).
            token_mask: `[T]`, False for padding, which then takes no capacity and is chosen by no expert.
        """
        router_logits = self._logits(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return route(router_logits, self.config, self.e_score_correction_bias, self.training, token_mask)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        # float32 also under autocast: bf16 ties and rounding change the choice
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        hidden_states = hidden_states.to(dtype)
        noise = self.config.router_jitter_noise
        if self.training and noise > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - noise, 1 + noise)
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return F.linear(hidden_states, self.weight.to(dtype))


@use_experts_implementation
class HfMoeExperts(nn.Module):
    """All experts of a layer as fused matrices; `experts_implementation` chooses what runs them."""

    # set by the decorator
    _apply_gate: Callable[[Tensor], Tensor]
    _is_expert_parallel: bool
    may_skip_slots: bool

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The `eager` implementation: a loop over the experts that were chosen; the id `num_experts` is skipped.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: `[T, K]`, int64.
            top_k_weights: `[T, K]`.
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            # slot by slot, the order in which the native models add up: bit-equal gradients
            slot, token = torch.where(top_k_index.transpose(0, 1) == expert)
            if token.numel() == 0:
                continue
            projected = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            projected = F.linear(projected, self.down_proj[expert]) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, projected.to(output.dtype))
        return output


class HfMoeSparseMoeBlock(nn.Module):
    """Router, experts, and shared experts that every token passes."""

    def __init__(self, config: HfMoeConfig, model_config: HfMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.packs_assignments = config.routing == "expert_choice"
        self.gate = HfMoeRouter(config)
        self.experts = HfMoeExperts(config)
        # with per_layer_config, `config` is a copy that a later set_experts_implementation() would not reach
        self.experts.config = model_config
        # the id num_experts is skipped: our flag, and the one that transformers' own implementations read
        self.experts.may_skip_slots = self.experts._is_expert_parallel = config.can_skip_slots
        self.shared_experts: HfMoeMLP | None = None
        if config.num_shared_experts > 0:
            width = config.num_shared_experts * config.moe_intermediate_size
            self.shared_experts = HfMoeMLP(config, intermediate_size=width)

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None = None, late_gradient: LateGradient | None = None
    ) -> Tensor:
        tokens = hidden_states.flatten(0, 1)
        mask = None if token_mask is None else token_mask.flatten()
        _, top_k_weights, top_k_index, decision = self.gate(tokens, mask)
        if late_gradient is not None and late_gradient.is_awaited:
            tokens = late_gradient.deliver(tokens, decision[:2])
        run = self._run_packed if self.packs_assignments else self._run_experts
        output = run(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output

    def _run_experts(self, tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.experts.num_experts != self.num_experts:
            # expert parallelism exchanges real ids only; an unused slot has weight 0
            top_k_index = top_k_index.clamp(max=self.num_experts - 1)
        return self.experts(tokens, top_k_index, top_k_weights)

    def _run_packed(self, tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Experts that choose tokens take a fixed number: run those rows, not one for each token and expert."""
        num_tokens = tokens.shape[0]
        num_rows = self.num_experts * min(num_tokens, expert_capacity(num_tokens, self.num_experts, self.gate.config))
        token, weight, index = pack_assignments(top_k_weights, top_k_index, num_rows)
        return torch.zeros_like(tokens).index_add(0, token, self._run_experts(tokens[token], index, weight))


class HfMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a MoE block or a dense MLP, each behind a norm and a residual."""

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        layer_config = config.per_layer_config[layer_idx]
        self.self_attn = HfMoeAttention(config, layer_idx)
        if config.is_moe_layer(layer_idx):
            self.mlp = HfMoeSparseMoeBlock(layer_config, config)
        else:
            self.mlp = HfMoeMLP(layer_config, intermediate_size=config.intermediate_size)
        self.input_layernorm = HfMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HfMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        token_mask: Tensor | None = None,
        late_gradient: LateGradient | None = None,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,  # the cache among them
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, HfMoeSparseMoeBlock):
            return residual + self.mlp(hidden_states, token_mask, late_gradient)
        return residual + self.mlp(hidden_states)


class HfMoePreTrainedModel(VerifiedCheckpointMixin, OneCommitPushMixin, PreTrainedModel):
    config: HfMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfMoeDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}  # noqa: RUF012
    # each class below names its `_auto_class`: saved checkpoints carry this file and load without hf_moe as well
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(HfMoeRouter, index=0),
        "router_decisions": OutputRecorder(HfMoeRouter, index=3),
        "hidden_states": HfMoeDecoderLayer,
        "attentions": HfMoeAttention,
    }

    def __init__(self, config: HfMoeConfig, *args: Any, **kwargs: Any):
        # from_pretrained(..., num_experts_per_tok=99) and assignments change a configuration after its checks
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HfMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, HfMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class HfMoeModel(HfMoePreTrainedModel):
    """Embedding, decoder layers and final norm; without a task, so without a loss.

    Source: the decoder of Qwen3-MoE (arXiv:2505.09388); for its routing see `HfMoeConfig` and `routing.py`.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([HfMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = HfMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HfMoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        # the model's own: an argument of that name changes the config while the forward runs (continuous batching)
        self.is_causal = config.is_causal
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        late_gradients: Sequence[LateGradient] | None = None,
        **kwargs: Any,
    ) -> HfMoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[B, S]`, int64; give these or `inputs_embeds`.
            attention_mask: `[B, S]` with 0 for padding, or a 4-D mask (then all tokens count as real for the router).
            position_ids: `[B, S]` or `[1, S]`, int64.
            inputs_embeds: `[B, S, H]`.
            past_key_values, cache: The key/value cache; transformers 5.24 and newer call it `cache`.
            late_gradients: One for each layer, to take the gradient of its router's decision under reentrant gradient
                checkpointing.
            **kwargs: `output_router_logits` and the like, and what attention reads.

        Returns:
            `last_hidden_state` `[B, S, H]` in the model's dtype, the cache, and what was asked for of each layer.

        Raises:
            ValueError: Both or none of `input_ids` and `inputs_embeds`; a cache where attention is not causal, or two.
            TypeError: An argument that nothing reads.
        """
        refuse_unread(self, kwargs, has_positions=position_ids is not None)
        cache = one_cache(past_key_values, cache)
        if CACHE != "cache" and cache is not None and not isinstance(cache, Cache):
            # of continuous batching, whose attention reads it under this name
            kwargs["cache"], cache = cache, None
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if not self.is_causal and (use_cache or cache is not None):
            raise ValueError(
                "A key/value cache needs causal attention, and this model has is_causal=False; pass use_cache=False."
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = positions[None] + (0 if cache is None else cache.get_seq_length())
        attention = layer_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        competing = token_mask(self.config, inputs_embeds, attention_mask, self.training)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = inputs_embeds
        for index, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=attention,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                token_mask=competing,
                late_gradient=None if late_gradients is None else late_gradients[index],
                **{CACHE: cache},
                **kwargs,
            )
        return HfMoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class HfMoeHeadModel(HfMoePreTrainedModel):
    """The decoder under a task's head, with the balancing losses added to the task's loss.

    They enter in training mode only, from the decisions that the routers made, without padding: in evaluation `loss`
    is the loss of the task. A micro-batch counts with its share of the optimizer step's items (`num_items_in_batch`,
    which the Trainer passes), as the task's loss does: gradient accumulation and several processes then give the
    gradient of one large batch.
    """

    _output_class: Any

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.model = HfMoeModel(config)
        self._global_batch_counts = GlobalBatchCounts()

    def _run_model(self, output_router_logits: bool | None, **inputs: Any) -> HfMoeModelOutputWithPast:
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        balances = self.training and (self.config.router_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0)
        records = balances or output_router_logits
        late = None
        if records and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            late = [LateGradient() for _ in range(self.config.num_hidden_layers)]
        outputs = self.model(
            output_router_logits=output_router_logits, output_router_decisions=records, late_gradients=late, **inputs
        )
        # no decisions: no MoE layer, or blocks of somebody's own
        if late and outputs.router_decisions:
            of_moe_layers = [gradient for index, gradient in enumerate(late) if self.config.is_moe_layer(index)]
            attach_late_gradients(of_moe_layers, outputs)
        return outputs

    def _outputs(
        self,
        outputs: HfMoeModelOutputWithPast,
        loss: Tensor | None,
        attention_mask: Tensor | None,
        share: Tensor | None = None,
        **logits: Tensor,
    ) -> Any:
        """The output of every head: the loss with the balancing losses added, these by themselves, and the records."""
        config, aux_loss, z_loss = self.config, None, None
        if outputs.router_decisions:
            counts = self._global_batch_counts if self.training and config.balance_scope == "global_batch" else None
            aux_loss, z_loss = balancing_losses(
                outputs.router_decisions, attention_mask, config.num_null_experts, counts, share
            )
            if loss is not None and self.training:
                total = config.router_aux_loss_coef * aux_loss + config.router_z_loss_coef * z_loss
                loss = loss + (total if share is None else total * share).to(loss.device)
        fields = self._output_class.__dataclass_fields__
        records = ("router_logits", "hidden_states", "attentions", CACHE)
        logits |= {name: getattr(outputs, name) for name in records if name in fields}
        return self._output_class(loss=loss, aux_loss=aux_loss, z_loss=z_loss, **logits)


class HfMoeForCausalLM(HfMoeHeadModel, GenerationMixin):
    """The decoder with a language modelling head.

    Raises:
        ValueError: If `config.is_causal` is False.
    """

    _auto_class = "AutoModelForCausalLM"
    _output_class = HfMoeCausalLMOutputWithPast
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: HfMoeConfig):
        config.require_causal("HfMoeForCausalLM")
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> HfMoeCausalLMOutputWithPast:
        """Predict the next token of every position; what is not named here is as in `HfMoeModel.forward`.

        Args:
            labels: `[B, S]`, int64, shifted here; -100 is left out. `shift_labels` `[B, S]` are shifted already, and
                the loss is divided by `num_items_in_batch` where it is given.
            logits_to_keep: The last positions to compute logits of (0: all), or their indices `[L]`.

        Returns:
            `logits` `[B, L, V]` in the model's dtype, `loss` (a float32 scalar) with labels, the cache, and where
            routers were recorded `aux_loss`, `z_loss` (scalars) and `router_logits` (`[T, X]` of each MoE layer, over
            experts and null experts).
        """
        # no parameters: the Trainer takes every name with "label" in it for a label that each batch must have
        shift_labels, num_items_in_batch = (kwargs.pop(name, None) for name in ("shift_labels", "num_items_in_batch"))
        outputs = self._run_model(
            output_router_logits,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: one_cache(past_key_values, cache)},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch, shift_labels=shift_labels
            )
        share = share_of_step(labels, num_items_in_batch, shift_labels)
        return self._outputs(outputs, loss, attention_mask, share, logits=logits)


class HfMoeClassifier(HfMoeHeadModel):
    """The decoder under a classification head."""

    # the loss is a mean over the batch: the Trainer divides by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> HfMoeSequenceClassifierOutputWithPast | HfMoeTokenClassifierOutput:
        """Classify: the class describes labels and logits, `HfMoeModel.forward` all other arguments."""
        outputs = self._run_model(output_router_logits, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self._classify(outputs.last_hidden_state, input_ids, attention_mask)
        loss = None if labels is None else self._task_loss(logits, labels)
        return self._outputs(outputs, loss, attention_mask, logits=logits)


class HfMoeForSequenceClassification(HfMoeClassifier):
    """The decoder with a classification head on the last token that is not padding.

    `forward` takes `labels` `[B]` (int64, or floats `[B, num_labels]` for regression and several labels at a time, as
    `config.problem_type` says) and returns `logits` `[B, num_labels]`; the loss is a mean over the rows.

    Raises:
        ValueError: From `forward`: several rows, and neither `attention_mask` nor `config.pad_token_id` tells what is
            padding.
    """

    _auto_class = "AutoModelForSequenceClassification"
    _output_class = HfMoeSequenceClassifierOutputWithPast

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _classify(self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        last = last_token(self.config, hidden_states, input_ids, attention_mask)
        return self.score(hidden_states[torch.arange(last.shape[0], device=last.device), last])

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)


class HfMoeForTokenClassification(HfMoeClassifier):
    """The decoder with a classification head on each token.

    `forward` takes `labels` `[B, S]`, int64, of which -100 is left out, and returns `logits` `[B, S, num_labels]`; the
    loss is a mean over the labels.
    """

    _auto_class = "AutoModelForTokenClassification"
    _output_class = HfMoeTokenClassifierOutput

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _classify(self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        return self.score(self.dropout(hidden_states))

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits, labels, self.config)


class HfMoeForQuestionAnswering(HfMoeHeadModel):
    """The decoder with a head for the start and the end of an answer."""

    _auto_class = "AutoModelForQuestionAnswering"
    _output_class = HfMoeQuestionAnsweringModelOutput

    accepts_loss_kwargs = False

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> HfMoeQuestionAnsweringModelOutput:
        """Find where an answer starts and ends; what is not named here is as in `HfMoeModel.forward`.

        Args:
            start_positions: `[B]`, int64; with `end_positions` `[B]` they give the loss, a mean over the rows.

        Returns:
            `start_logits` and `end_logits`, both `[B, S]`, and what the other heads return.
        """
        outputs = self._run_model(output_router_logits, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return self._outputs(outputs, loss, attention_mask, start_logits=start_logits, end_logits=end_logits)


# here and not in hf_moe's registration: the copy of this file on the Hub loads the same checkpoints
register_conversion_mapping()

__all__ = [
    "HfMoeForCausalLM",
    "HfMoeForQuestionAnswering",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "HfMoePreTrainedModel",
]
