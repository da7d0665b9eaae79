"""What a model writes: to see the outcome of a fine-tuning.

Used by `hf-moe generate`:

    prompts.py     a prompt or a conversation as tokens, through the chat template where there is one
    generator.py   draw an answer from a model, with its adapter or without, printed as it comes
"""
