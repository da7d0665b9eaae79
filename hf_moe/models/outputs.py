"""Outputs of the models: those of transformers with the balancing losses and the routers' decisions."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from .routing import RoutingDecision


@dataclass
class HfMoeModelOutputWithPast(MoeModelOutputWithPast):
    """The output of transformers and the decision of each router."""

    router_decisions: tuple[RoutingDecision, ...] | None = None


@dataclass
class HfMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The output of transformers; `aux_loss` is the load balancing loss (1 when balanced), `z_loss` the z-loss."""

    z_loss: Tensor | None = None


@dataclass
class _BalancingOutput:
    """Scalars and `[T, X]` logits of each MoE layer, for heads whose outputs have none in transformers.

    The first base of an output: fields of the second, transformers' own, then come first.
    """

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class HfMoeSequenceClassifierOutputWithPast(_BalancingOutput, SequenceClassifierOutputWithPast):
    """The output of transformers with the balancing losses and router logits."""


@dataclass
class HfMoeTokenClassifierOutput(_BalancingOutput, TokenClassifierOutput):
    """The output of transformers with the balancing losses and router logits."""


@dataclass
class HfMoeQuestionAnsweringModelOutput(_BalancingOutput, QuestionAnsweringModelOutput):
    """The output of transformers with the balancing losses and router logits."""
