"""Tiny models whose experts are transformers' FP8Experts, and the dense models that these stand for.

Transformers' quantiser refuses a machine without a GPU, so its module is put in place and filled here.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from hf_moe.layers.geometry import projection_name
from hf_moe.layers.moe_layers import moe_layers

FP8 = torch.float8_e4m3fn


def quantise(stack, block, power_of_two=False):
    """`[..., B, A]` in fp8, the inverse scale of each block, the last of a row or column cut off, and the products."""
    B, A = stack.shape[-2:]
    rows, columns = (B, A) if block is None else block
    padded = F.pad(stack.detach().float().abs(), (0, -A % columns, 0, -B % rows))
    largest = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))
    scale = largest.clamp(min=1e-12) / torch.finfo(FP8).max
    if power_of_two:
        scale = scale.log2().ceil().exp2()
    wide = scale.repeat_interleave(rows, -2)[..., :B, :].repeat_interleave(columns, -1)[..., :A]
    values = (stack / wide).to(FP8)
    scale = scale.to(torch.float8_e8m0fnu) if power_of_two else scale
    return values, scale, (values.float() * wide).to(stack.dtype)


def quantise_halves(stack, block, power_of_two=False):
    """Gate and up, each with blocks of its own, as checkpoints store them."""
    parts = (quantise(half, block, power_of_two) for half in stack.chunk(2, -2))
    return tuple(torch.cat(tensors, -2) for tensors in zip(*parts, strict=True))


def with_fp8_experts(model, block=(8, 16), scale_fmt="float", **settings):
    """Two copies of a model: its experts in fp8, and with the dense weights that they stand for."""
    fp8, dense = copy.deepcopy(model), copy.deepcopy(model)
    others = [name for name, module in fp8.named_modules() if type(module) is nn.Linear]
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt, **settings)
    replace_with_fp8_linear(fp8, modules_to_not_convert=others, quantization_config=config)
    for layer, plain in zip(moe_layers(fp8), moe_layers(dense), strict=True):
        for projection in ("up", "down"):
            name = projection_name(plain.experts, projection)
            stack = getattr(plain.experts, name).data
            cut = quantise_halves if name == "gate_up_proj" else quantise
            values, scale, products = cut(stack, block, scale_fmt == "ue8m0")
            assert getattr(layer.experts, f"{name}_scale_inv").shape == scale.shape
            setattr(layer.experts, name, nn.Parameter(values, requires_grad=False))
            setattr(layer.experts, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
            stack.copy_(products)
        for name, parameter in layer.experts.named_parameters():
            if parameter.is_meta:  # scales of activations
                setattr(layer.experts, name, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
    return fp8.eval(), dense
