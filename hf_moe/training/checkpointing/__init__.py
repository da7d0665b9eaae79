"""Checkpoints of a Trainer that nothing can damage, and runs that resume from them.

From the Trainer class down:

    safe_checkpoint.py    SafeCheckpointMixin for a Trainer class: all of what follows
    checkpoints.py        the manifest that marks a whole checkpoint, the choice of one, room on the disk
    resumption.py         weights of a checkpoint back in the model, and what cannot be resumed
    termination.py        SIGTERM, handled between two steps by all processes
    broken_evaluation.py  evaluation that stops at SIGTERM, and is run again by the run that resumes
    non_finite.py         a stop at a loss or gradient that is NaN or infinite
    cpu_copy.py           values on their way to the CPU, which no step waits for
"""
