"""Triton kernels of a layer of experts, for every GPU that Triton compiles for.

One layer, forward; names end with their shape (T tokens, K slots, N = T*K routed rows, E experts, H hidden, I width,
P pre-activation, R rank):

    order, expert_end, tile_maps = sort_rows(index_TK)          routing: slots by expert; the CPU waits for nothing
    act_NI, pre_NP    = up(hidden_TH[order // K], up_weight)    up: gather, product, activation; pre kept to train
    rows_NH[order]    = weights_N * (act_NI @ down_weight)      grouped_linear: scatter to slots
    out_TH            = rows_NH.view(T, K, H).sum(1)            combine: float32, in the order of the slots

and backward, each line only if its result is wanted:

    grad_pre_NP, weights * act, grad_weights_TK                 backward_activation: gather, product, act recomputed
    grad_hidden_TH    = (grad_pre_NP @ up_weight).sum(slots)    grouped_linear, combine
    grad_up, grad_down, grad_bias                               weight_gradient: per expert, rows gathered

Operators:

    ops.py                  the layer with dense or fp8 weights, and one linear map per expert
    low_rank.py             the layer under adapters, which add low-rank terms to the same launches
    hybrid.py               the layer where torch's grouped product is faster
    layer.py                what the three share: checks, what is kept, steps of several launches

Kernels and their launchers:

    routing.py              sort slots by expert, cut each expert's rows into tiles
    up.py                   up projection with activation
    grouped_linear.py       one linear map per expert, rows gathered or scattered
    combine.py              sum over a token's slots
    backward_activation.py  backward through down projection and activation
    weight_gradient.py      gradients of weights and biases
    decode.py               the layer for few rows without gradients: two launches, no sort
    between_products.py     the steps of hybrid.py between two products

For all of them:

    activation.py           activations in closed form
    fp8.py                  weights of 8 bits, multiplied by the scales of their blocks as they are loaded
    tiles.py                tile sizes by device, dtype and shape, from tiles/*.json
"""
