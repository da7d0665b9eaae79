"""Model cards from facts, and pushes of whole models to the Hub.

The card is `write_card`, the push `push.plan_push`, then `push.send`:

    cards/            the model card, from what a checkpoint, a run, an evaluation and a trace tell
    push.py           plan a push, send it in one commit, download and compare it
    upload_files.py   the files of a folder that are sent, and those that are left out
    load_check.py     load what is about to be sent, as anybody will who downloads it
    remote.py         what the repository holds, and what the push changes there
    secrets.py        find tokens and private keys in files
    scrub.py          take tokens, local paths and user names out of a text
    renew_code.py     give a folder the code of the installed hf_moe
    errors.py         errors of a push, and what the Hub's answers mean
"""

from hf_moe.hub.cards.card import model_card, write_card

__all__ = ["model_card", "write_card"]
