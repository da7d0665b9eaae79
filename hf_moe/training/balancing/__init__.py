"""Balance the load of the experts while a model of any family trains.

From the config to the gradient:

    config.py       BalancingConfig: the terms and their weights
    mixin.py        BalancingMixin for a Trainer class, and a callback for bias updates alone
    checks.py       refusals before the first forward: frozen routers, dense layers, losses counted twice
    terms.py        from a micro-batch's decisions to its losses, with proof of their gradients
    losses.py       decisions of a layer in one form, and the loss by row of the batch
    step_share.py   the share of an optimizer step that a micro-batch is
    bias_update.py  balancing without a loss: the bias of the choice, after each optimizer step
"""
