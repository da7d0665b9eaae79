"""The `hf_moe` architecture. A forward pass reads top to bottom: router, experts, block, decoder layer, model, heads.

Attention, norms and rotary embedding are Qwen3-MoE's, so that the host's fixes arrive here; what is ours is the MoE.
All classes are in one file, as in the host: it looks for the experts' decorator in the file of the model class, and
saved checkpoints carry the file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
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
from .late_gradient import LateGradient
from .losses import GlobalBatchCounts, count_assignments, load_balancing_loss, router_z_loss
from .routing import (
    RouterOutput,
    RoutingDecision,
    choose_all,
    choose_tokens,
    choose_top_k,
    choose_top_p,
    drop_over_capacity,
    expert_capacity,
    pack_assignments,
    slot_weights,
)
from .transformers_names import REPEATS_POSITIONS, cache_name, check_parameters, one_cache, refuse_unread

check_parameters(
    {
        create_causal_mask: ("config", "inputs_embeds", "attention_mask", "position_ids"),
        Qwen3MoeAttention.forward: ("hidden_states", "position_embeddings", "attention_mask"),
    }
)
CACHE = cache_name(create_causal_mask, Qwen3MoeAttention.forward)


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
    """Rotary position embedding, with all of the host's `rope_parameters`."""


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
        scores = router_logits.softmax(-1) if self.config.router_scoring == "softmax" else router_logits.sigmoid()
        choice = self._choose(scores, token_mask)
        weights, index = slot_weights(
            scores,
            choice,
            self.num_experts,
            # all the probabilities add up to 1 already
            normalize=self.config.norm_topk_prob
            and not (self.config.routing == "dense" and self.config.router_scoring == "softmax"),
            scale=self.config.routed_scaling_factor,
            epsilon=1e-20 if self.config.router_scoring == "sigmoid" else 0.0,
        )
        if self.training and self.config.capacity_factor is not None and self.config.routing != "expert_choice":
            capacity = self.capacity(scores.shape[0])
            weights, index = drop_over_capacity(
                weights, index, self.num_experts, capacity, self.config.drop_policy, token_mask
            )
        return RouterOutput(router_logits, weights, index, RoutingDecision(router_logits, scores, choice))

    def capacity(self, num_tokens: int) -> int:
        """Assignments that an expert may take of `num_tokens` tokens."""
        factor = 1.0 if self.config.capacity_factor is None else self.config.capacity_factor
        return expert_capacity(num_tokens, self.config.num_experts_per_tok, self.num_experts, factor)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        # float32 also under autocast: bf16 ties and rounding change the choice
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        hidden_states = hidden_states.to(dtype)
        noise = self.config.router_jitter_noise
        if self.training and noise > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - noise, 1 + noise)
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return F.linear(hidden_states, self.weight.to(dtype))

    def _choose(self, scores: Tensor, token_mask: Tensor | None) -> Tensor:
        """Ids `[T, K]` in `[0, X]`; the choice itself has no gradient, the weights have."""
        scores, config = scores.detach(), self.config
        if config.routing == "dense":
            return choose_all(scores)
        if config.routing == "top_p":
            return choose_top_p(scores, config.num_experts_per_tok, config.router_top_p)
        if config.routing == "expert_choice":
            return choose_tokens(scores, min(scores.shape[0], self.capacity(scores.shape[0])), token_mask)
        return choose_top_k(
            scores,
            config.num_experts_per_tok,
            self.e_score_correction_bias,
            config.n_group,
            config.topk_group,
            best_per_group=2 if config.router_scoring == "sigmoid" else 1,
        )


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
        num_rows = self.num_experts * min(tokens.shape[0], self.gate.capacity(tokens.shape[0]))
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


@dataclass
class HfMoeModelOutputWithPast(MoeModelOutputWithPast):
    """The host's output and the decision of each router."""

    router_decisions: tuple[RoutingDecision, ...] | None = None


@dataclass
class HfMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The host's output; `aux_loss` is the load balancing loss (1 when balanced), `z_loss` the router z-loss."""

    z_loss: Tensor | None = None


@dataclass
class HfMoeSequenceClassifierOutputWithPast(SequenceClassifierOutputWithPast):
    """The host's output with the balancing losses and router logits."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class HfMoeTokenClassifierOutput(TokenClassifierOutput):
    """The host's output with the balancing losses and router logits."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class HfMoeQuestionAnsweringModelOutput(QuestionAnsweringModelOutput):
    """The host's output with the balancing losses and router logits."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


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


# taken out of a forward's keyword arguments by `capture_outputs`
_RECORDED = frozenset(f"output_{name}" for name in HfMoePreTrainedModel._can_record_outputs)


class HfMoeModel(HfMoePreTrainedModel):
    """Embedding, decoder layers and final norm."""

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
            input_ids: `[B, S]`; give these or `inputs_embeds`.
            attention_mask: `[B, S]` with 0 for padding, or a 4-D mask (then all tokens count as real for the router).
            inputs_embeds: `[B, S, H]`.
            past_key_values, cache: The key/value cache; transformers 5.24 and newer call it `cache`.
            late_gradients: One for each layer, to take the gradient of its router's decision under reentrant gradient
                checkpointing.

        Raises:
            ValueError: Both or none of `input_ids` and `inputs_embeds`; a cache where attention is not causal, or two.
            TypeError: An argument that nothing reads.
        """
        refuse_unread(self, kwargs, _RECORDED if position_ids is None else _RECORDED | REPEATS_POSITIONS)
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
            past_length = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = positions.unsqueeze(0)
        layer_mask = self._attention_mask(inputs_embeds, attention_mask, cache, position_ids)
        token_mask = self._token_mask(inputs_embeds, attention_mask)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = inputs_embeds
        for index, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=layer_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                token_mask=token_mask,
                late_gradient=None if late_gradients is None else late_gradients[index],
                **{CACHE: cache},
                **kwargs,
            )
        return HfMoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _attention_mask(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor
    ) -> Any:
        arguments = {"config": self.config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        has_window = self.config.sliding_window is not None
        if not self.config.is_causal:
            create = create_bidirectional_sliding_window_mask if has_window else create_bidirectional_mask
            return create(**arguments)
        create = create_sliding_window_causal_mask if has_window else create_causal_mask
        return create(**arguments, **{CACHE: cache}, position_ids=position_ids)

    def _token_mask(self, inputs_embeds: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """`[B, S]`, True for real tokens, where the routing asks: tokens compete for places in an expert."""
        competes = self.config.routing == "expert_choice" or (
            self.training and self.config.capacity_factor is not None
        )
        if not competes or attention_mask is None or attention_mask.dim() != 2:
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :].bool()


class HfMoeHeadModel(HfMoePreTrainedModel):
    """The decoder under a task's head, with the balancing losses added to the task's loss.

    They enter in training mode only, from the decisions that the routers made, without padding: in evaluation `loss`
    is the loss of the task. A micro-batch counts with its share of the optimizer step's items (`num_items_in_batch`,
    which the Trainer passes), as the task's loss does: gradient accumulation and several processes then give the
    gradient of one large batch.
    """

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
            output_router_logits=output_router_logits,
            output_router_decisions=records,
            late_gradients=late,
            **inputs,
        )
        # no decisions: no MoE layer, or blocks of somebody's own
        return self._with_late_gradients(outputs, late) if late and outputs.router_decisions else outputs

    def _with_late_gradients(
        self, outputs: HfMoeModelOutputWithPast, late: list[LateGradient]
    ) -> HfMoeModelOutputWithPast:
        """The same, with gradients for decisions that reentrant gradient checkpointing computed without."""
        moe_layers = [index for index in range(self.config.num_hidden_layers) if self.config.is_moe_layer(index)]
        hidden_states, decisions = outputs.last_hidden_state, []
        for index, decision in zip(moe_layers, outputs.router_decisions or (), strict=True):
            if not decision.scores.requires_grad:
                hidden_states, (logits, scores) = late[index].attach(hidden_states, decision[:2])
                decision = RoutingDecision(logits, scores, decision.choice)
            decisions.append(decision)
        outputs.last_hidden_state = hidden_states
        outputs.router_decisions = tuple(decisions)
        if outputs.router_logits is not None:
            outputs.router_logits = tuple(decision.router_logits for decision in decisions)
        return outputs

    def _outputs(
        self,
        outputs: HfMoeModelOutputWithPast,
        loss: Tensor | None,
        attention_mask: Tensor | None,
        share: Tensor | None = None,
    ) -> dict[str, Any]:
        """What all heads return: the loss with the balancing losses added, these by themselves, and the records."""
        aux_loss, z_loss = self._balancing_losses(outputs, attention_mask, share)
        if loss is not None and self.training and aux_loss is not None and z_loss is not None:
            total = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
            loss = loss + (total if share is None else total * share).to(loss.device)
        return {
            "loss": loss,
            "aux_loss": aux_loss,
            "z_loss": z_loss,
            "router_logits": outputs.router_logits,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }

    def _balancing_losses(
        self, outputs: HfMoeModelOutputWithPast, attention_mask: Tensor | None, share: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Load balancing and z-loss, each a mean over the layers; None where no router was recorded."""
        decisions = outputs.router_decisions
        if not decisions:
            return None, None
        device, null = decisions[0].scores.device, self.config.num_null_experts
        masks = [_flat_mask(attention_mask, decision) for decision in decisions]
        counts = [count_assignments(*pair) for pair in zip(decisions, masks, strict=True)]
        if self.config.balance_scope == "global_batch" and self.training:
            counts = self._global_batch_counts.update([layer.to(device) for layer in counts], share)
        balance = [
            load_balancing_loss(decision, decision.scores.shape[-1] - null, mask, layer.to(decision.scores.device))
            for decision, mask, layer in zip(decisions, masks, counts, strict=True)
        ]
        z = [router_z_loss(*pair) for pair in zip(decisions, masks, strict=True)]
        aux_loss, z_loss = (torch.stack([value.to(device) for value in values]).mean() for values in (balance, z))
        return aux_loss, z_loss


def _flat_mask(attention_mask: Tensor | None, decision: RoutingDecision) -> Tensor | None:
    """`[T]`: 0 for padding. A cached prefix in the mask has no tokens here; a 4-D mask does not tell padding."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    length = decision.scores.shape[0] // attention_mask.shape[0]
    return attention_mask[:, -length:].flatten().to(decision.scores.device)


class HfMoeForCausalLM(HfMoeHeadModel, GenerationMixin):
    """The decoder with a language modelling head."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: HfMoeConfig):
        if not config.is_causal:
            raise ValueError(
                f"HfMoeForCausalLM decodes causally and needs is_causal=True, got is_causal=False with "
                f"routing={config.routing!r}. For an encoder use HfMoeModel or a classification head; for a language "
                f"model choose routing='top_k', 'top_p' or 'dense'."
            )
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
        """Logits `[B, S, V]`, and the next-token loss where `labels` `[B, S]` (-100 is left out) are given.

        `shift_labels` `[B, S]` are labels that are shifted already; the loss is divided by `num_items_in_batch`.
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
        share = _share_of_step(labels, num_items_in_batch, shift_labels)
        return HfMoeCausalLMOutputWithPast(
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            **self._outputs(outputs, loss, attention_mask, share),
        )


def _share_of_step(
    labels: Tensor | None, num_items_in_batch: Tensor | int | None, shift_labels: Tensor | None
) -> Tensor | None:
    """The part of an optimizer step's items that these labels are, counted as the Trainer counts them."""
    targets = shift_labels if shift_labels is not None or labels is None else labels[..., 1:]
    if num_items_in_batch is None or targets is None:
        return None
    items = torch.as_tensor(num_items_in_batch, device=targets.device, dtype=torch.float32).mean()
    return targets.ne(-100).sum() / items.clamp_min(1)


class HfMoeForSequenceClassification(HfMoeHeadModel):
    """The decoder with a classification head on the last token that is not padding."""

    _auto_class = "AutoModelForSequenceClassification"

    # its loss is a mean over the batch: the Trainer divides by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> HfMoeSequenceClassifierOutputWithPast:
        """Logits `[B, num_labels]`; the loss is regression or classification as `config.problem_type` says.

        Raises:
            ValueError: Several rows, and neither `attention_mask` nor `config.pad_token_id` tells what is padding.
        """
        outputs = self._run_model(output_router_logits, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        last = self._last_token(outputs.last_hidden_state, input_ids, attention_mask)
        logits = self.score(outputs.last_hidden_state[torch.arange(last.shape[0], device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return HfMoeSequenceClassifierOutputWithPast(
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            **self._outputs(outputs, loss, attention_mask),
        )

    def _last_token(self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Position `[B]` of the last real token, with left or right padding."""
        batch, length = hidden_states.shape[:2]
        positions = torch.arange(length, device=hidden_states.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            is_real = attention_mask[:, -length:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            is_real = input_ids != self.config.pad_token_id
        elif batch == 1:
            return positions[-1:]
        else:
            raise ValueError(
                f"Cannot tell the last token of {batch} rows: pass attention_mask [B, S], or set config.pad_token_id."
            )
        return (positions * is_real.to(positions)).argmax(-1)


class HfMoeForTokenClassification(HfMoeHeadModel):
    """The decoder with a classification head on each token."""

    _auto_class = "AutoModelForTokenClassification"

    accepts_loss_kwargs = False

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> HfMoeTokenClassifierOutput:
        """Logits `[B, S, num_labels]`, and the loss where `labels` `[B, S]` (-100 is left out) are given."""
        outputs = self._run_model(output_router_logits, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return HfMoeTokenClassifierOutput(
            logits=logits,
            **self._outputs(outputs, loss, attention_mask),
        )


class HfMoeForQuestionAnswering(HfMoeHeadModel):
    """The decoder with a head for the start and the end of an answer."""

    _auto_class = "AutoModelForQuestionAnswering"

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
        """Start and end logits `[B, S]`, and the loss where both positions `[B]` are given."""
        outputs = self._run_model(output_router_logits, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return HfMoeQuestionAnsweringModelOutput(
            start_logits=start_logits,
            end_logits=end_logits,
            **self._outputs(outputs, loss, attention_mask),
        )


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
