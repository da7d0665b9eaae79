"""Train a Mixture-of-Experts model with the Trainer of transformers.

From the Trainer down:

    trainer.py           MoeTrainer: the Trainer with balancing, safe checkpoints and routing metrics
    balancing/           losses and bias updates that spread the load over the experts
    checkpointing/       checkpoints that survive kills, full disks, SIGTERM and a run that diverges
    routing_metrics.py   the balance of the routing in the log, and a warning or stop at a collapse
    routing_listener.py  every routing decision of a training, for balancing and metrics
    rollback.py          return to the last good weights when routing leaves its thresholds
    callbacks.py         proof of a frozen router; a progress bar with the balance
    same_weights.py      proof that several processes train one model
    autograd_graph.py    parameters that a gradient flows into
"""
