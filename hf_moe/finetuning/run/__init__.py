"""A run of the plain recipes.

Decided and printed before it:

    learning_rate.py   the rate beside what models of this size bear, and what bfloat16 weights lose of it
    checkpointing.py   gradient checkpointing: on where the device's memory asks for it
    plan.py            the table that is printed before training

Measured and printed while it trains:

    evaluation.py      held-out metrics of every domain, the best checkpoint, early stopping
    screen.py          the log on the screen, a line of 80 columns
"""
