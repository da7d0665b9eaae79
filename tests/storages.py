"""Three small storages of experts that are no dense tensors: eight bits, four bits in a module, and a file."""

import copy

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_moe.layers.expert_rows import linear_by_expert
from hf_moe.layers.geometry import projection_name
from hf_moe.layers.moe_layers import moe_layers

PROJECTIONS = ("up", "down")


class _Stored:
    """What both have in common: they give one expert's matrix `[out, in]`, and note which was asked for."""

    def __init__(self, experts):
        weight = experts.down_proj
        self.num_experts, self.dtype, self.device = len(weight), weight.dtype, weight.device
        self.shapes = {projection: tuple(stack_of(experts, projection).shape[1:]) for projection in PROJECTIONS}
        names = {projection: f"{projection_name(experts, projection)}_bias" for projection in PROJECTIONS}
        self.biases = {p: getattr(experts, name).detach() if experts.has_bias else None for p, name in names.items()}
        self.touched = []

    def shape(self, projection):
        return self.shapes[projection]

    def linear(self, rows_NA, projection, plan):
        def matrices(experts):
            for expert in experts:
                self.touched.append((projection, expert))
                yield self.matrix(projection, expert)

        return linear_by_expert(rows_NA, plan, matrices, self.shapes[projection][0], self.biases[projection])

    def tensors(self):
        return None

    def operands(self):
        return None

    def prefetch(self, plan):
        pass


class EightBits(_Stored):
    """int8 values with a scale for each row."""

    format = "eight bits"

    def __init__(self, experts, folder):
        super().__init__(experts)
        self.values, self.scales = {}, {}
        for projection in PROJECTIONS:
            stack = stack_of(experts, projection)
            self.scales[projection] = stack.abs().amax(-1, keepdim=True) / 127
            self.values[projection] = (stack / self.scales[projection]).round().to(torch.int8)

    def matrix(self, projection, expert):
        return self.values[projection][expert].to(self.dtype) * self.scales[projection][expert]

    def nbytes(self):
        tensors = [*self.values.values(), *self.scales.values()]
        return {"cpu": sum(tensor.nbytes for tensor in tensors)}


class InAFile(_Stored):
    """Every expert's matrix is read from a safetensors file when it is needed."""

    format = "in a file"

    def __init__(self, experts, folder):
        super().__init__(experts)
        self.path = folder / f"{id(experts)}.safetensors"
        stacks = {projection: stack_of(experts, projection) for projection in PROJECTIONS}
        matrices = {f"{p}.{expert}": m.contiguous() for p, stack in stacks.items() for expert, m in enumerate(stack)}
        save_file(matrices, self.path)
        self.bytes = sum(matrix.nbytes for matrix in matrices.values())

    def matrix(self, projection, expert):
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(f"{projection}.{expert}")

    def nbytes(self):
        return {"disk": self.bytes}


class FourBits(nn.Module):
    """Two values in a byte with a scale for each group of eight, in buffers of a module."""

    format = "four bits"
    tensors, prefetch, linear = _Stored.tensors, _Stored.prefetch, _Stored.linear
    group = 8

    def __init__(self, experts, folder):
        super().__init__()
        like = _Stored(experts)
        self.num_experts, self.shapes, self.touched = like.num_experts, like.shapes, []
        for projection in PROJECTIONS:
            groups = stack_of(experts, projection).unflatten(-1, (-1, self.group))
            scales = groups.abs().amax(-1, keepdim=True) / 7
            nibbles = ((groups / scales).round() + 8).to(torch.uint8).flatten(-2)
            self.register_buffer(f"{projection}_packed", nibbles[..., ::2] | nibbles[..., 1::2] << 4)
            self.register_buffer(f"{projection}_scales", scales)
            self.register_buffer(f"{projection}_bias", like.biases[projection])

    @property
    def dtype(self):
        return self.down_scales.dtype

    @property
    def device(self):
        return self.down_scales.device

    @property
    def biases(self):
        return {projection: getattr(self, f"{projection}_bias") for projection in PROJECTIONS}

    def shape(self, projection):
        return self.shapes[projection]

    def matrix(self, projection, expert):
        return self.unpack(*(values[expert] for values in self.operands()[projection][:2]))

    @classmethod
    def unpack(cls, packed, scales):
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(scales.dtype) - 8
        return (nibbles.unflatten(-1, (-1, cls.group)) * scales).flatten(-2)

    def operands(self):
        """Packed values, scales and biases of both projections."""
        kinds = ("packed", "scales", "bias")
        return {projection: [getattr(self, f"{projection}_{kind}") for kind in kinds] for projection in PROJECTIONS}

    def nbytes(self):
        return {"cpu": sum(buffer.nbytes for buffer in self.buffers())}


STORAGES = (EightBits, FourBits, InAFile)


def stack_of(experts, projection):
    """`[E, out, in]`, whatever the layout of the module."""
    stack = getattr(experts, projection_name(experts, projection)).detach()
    return stack.transpose(1, 2) if experts.is_transposed else stack


def stored_as(model, storage, folder):
    """Two copies of a model: its experts in a storage, with placeholders for parameters, and the dense equivalent."""
    stored, dense = copy.deepcopy(model), copy.deepcopy(model)
    for layer, plain in zip(moe_layers(stored), moe_layers(dense), strict=True):
        experts = layer.experts
        kept = storage(experts, folder)
        for projection in PROJECTIONS:
            matrices = torch.stack([kept.matrix(projection, expert) for expert in range(kept.num_experts)])
            name = projection_name(experts, projection)
            stack_of(plain.experts, projection).copy_(matrices)
            # of the logical shape, without memory, and wrong if it is read
            placeholder = torch.full((), torch.nan, dtype=kept.dtype).expand(getattr(experts, name).shape)
            setattr(experts, name, nn.Parameter(placeholder, requires_grad=False))
        experts.expert_storage = kept
    return stored, dense


def touched(model):
    """What was read of each layer's storage since the last call."""
    found = []
    for layer in moe_layers(model):
        found.append(list(layer.experts.expert_storage.touched))
        layer.experts.expert_storage.touched.clear()
    return found


def assert_compiles(experts):
    """A layer of hidden size 32 and 8 experts gives the same compiled as run, for two lengths; its gradient too."""
    torch.compiler.reset()
    compiled = torch.compile(experts, backend="aot_eager")
    for tokens in (5, 7):
        index, weights = torch.arange(2 * tokens).view(tokens, 2) % 8, torch.rand(tokens, 2)
        hidden = torch.randn(tokens, 32, requires_grad=True)
        found = []
        for function in (experts, compiled):
            out = function(hidden, index, weights)
            found.append([out, *torch.autograd.grad(out.square().sum(), hidden)])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)
