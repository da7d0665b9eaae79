"""What a `TextProbe` measured of one model."""

from dataclasses import dataclass

from hf_moe.comparison.weight_drift import LayerWeights
from hf_moe.evaluation.bits_per_byte import BitsPerByte
from hf_moe.observability.routing_trace import RoutingTrace


@dataclass(frozen=True)
class Latency:
    """The fastest of a few forward passes without a cache, and without anything that listens.

    Attributes:
        seconds: Of the pass.
        tokens: In it.
    """

    seconds: float
    tokens: int

    @property
    def milliseconds_per_1k_tokens(self) -> float:
        return 1e6 * self.seconds / self.tokens


@dataclass(frozen=True)
class Measurement:
    """One model on the texts of a `TextProbe`.

    Attributes:
        trace: Routing by domain, of single tokens.
        bits: By domain.
        latency: By domain; empty if it was not measured.
        weights: Samples by layer; empty if they were not taken.
        window: Tokens that the model read at once, at most. Windows advance by half of it, so that the routing of most
            tokens counts twice.
    """

    trace: RoutingTrace
    bits: dict[str, BitsPerByte]
    latency: dict[str, Latency]
    weights: dict[str, LayerWeights]
    window: int
