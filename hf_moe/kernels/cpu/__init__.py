"""Experts on the CPU: a compiled kernel that is built on first use, as differentiable operators.

    ops.py       the layer with dense weights, and one linear map per expert
    low_rank.py  the layer under low-rank adapters
    checks.py    what the operators refuse
    build.py     compile the C++ once per machine and load it, or say why it cannot be
    cache.py     where compiled libraries lie, and which of them this machine may load
    __main__.py  build beforehand: `python -m hf_moe.kernels.cpu`

The C++: library.cpp (registers the operators), experts.h and lora.h (the layer), grouped_linear.h, and below them
routing.h, phases.h, low_rank.h, columns.h, stream.h, panels.h, multiply.h, activation.h, vectors.h.

Why transformers' implementations are slow, and what is done instead (measured on two cores; H=1024, I=512, E=64):

- Every expert's product is a call of its own that splits few rows over all threads. Here a thread has an expert (or
  columns of all experts) for itself, and several experts are under way at once.
- Few rows: time is the weights' bytes over the memory's speed. Up to 16 rows of an expert are multiplied with the
  weights as they lie, each read once and fetched ahead (16 tokens: 21 GB/s, where a plain read reaches 22 to 26).
  Where the inner dimension is not contiguous (the hidden gradient), whole weight rows are added up instead.
- Many rows: one vector of columns times 16 rows, which the multiply-add takes from memory itself, is 1.1 to 1.2 times
  as fast as the usual tile of two vectors times 8 rows (AVX512 float32); rows are packed and gathered 256 at a time.
- bfloat16: the library turns every weight into its own layout on every call. Here it is packed block by block in the
  cache, for the matrix unit where there is one.
- Training: the gradients of all weights are fresh memory, and the first touch of 4 KiB pages is dear (400 MB: 350 ms
  by one thread). Here large pages are asked for, each gradient is written once past the caches, and only empty
  experts' are zeroed.
- Copies: gathered rows [T*K, H], gate, up, activations, products and their weighted copies are tensors there; here
  gathering, bias, activation, weighting and the sum over slots happen in the cache, and only the pre-activations are
  kept for backward.
"""

from .build import unavailable_reason
from .low_rank import cpu_experts_lora
from .ops import cpu_experts, cpu_grouped_linear

__all__ = ["cpu_experts", "cpu_experts_lora", "cpu_grouped_linear", "unavailable_reason"]
