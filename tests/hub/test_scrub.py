"""Tokens and folders of this machine are taken out of a text, and nothing else."""

import random
import string

import pytest

from hf_moe.hub.scrub import scrub


def test_tokens_of_all_services_are_removed():
    draw = random.Random(0)
    hub, github = ("".join(draw.choices(string.ascii_letters, k=count)) for count in (60, 36))
    text = scrub(f"python x.py --a hf_oauth_{hub} --b=ghp_{github} --c")
    assert text == "python x.py --a [token removed] --b=[token removed] --c"


@pytest.mark.parametrize(
    "text",
    [
        "total / active",
        "owner/name",
        "https://github.com/a/b/c",
        "![x](plots/loss.png)",
        "| 1 / 2 |",
        "and/or",
        "/",
        "<summary>x</summary></details>",
    ],
)
def test_what_only_looks_like_a_path_stays(text):
    assert scrub(text) == text
