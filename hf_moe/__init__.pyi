"""The public names for type checkers and editors; the module itself imports each when it is first used."""

from hf_moe.adapters.adapter_experts import AdapterExpertsConfig as AdapterExpertsConfig
from hf_moe.adapters.expert_lora import accelerate_adapters as accelerate_adapters
from hf_moe.adapters.expert_lora import expert_lora_config as expert_lora_config
from hf_moe.adapters.expert_lora import merge_and_check as merge_and_check
from hf_moe.adapters.export import export_adapter as export_adapter
from hf_moe.adapters.frozen_router import freeze_router as freeze_router
from hf_moe.adapters.frozen_router import router_hash as router_hash
from hf_moe.adapters.frozen_router import verify_router_frozen as verify_router_frozen
from hf_moe.adapters.load_adapter import load_adapter as load_adapter
from hf_moe.layers.moe_layers import moe_layers as moe_layers
from hf_moe.models.configuration_hf_moe import HfMoeConfig as HfMoeConfig
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM as HfMoeForCausalLM
from hf_moe.models.modeling_hf_moe import HfMoeModel as HfMoeModel
from hf_moe.observability.explain import explain as explain
from hf_moe.observability.recording import record_routing as record_routing
from hf_moe.registration import register as register
from hf_moe.training.balancing.config import BalancingConfig as BalancingConfig
from hf_moe.training.callbacks import RouterFreezeCallback as RouterFreezeCallback
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin as SafeCheckpointMixin
from hf_moe.training.routing_metrics import CollapseCallback as CollapseCallback
from hf_moe.training.routing_metrics import RoutingMetricsCallback as RoutingMetricsCallback
from hf_moe.training.trainer import MoeTrainer as MoeTrainer

__version__: str
