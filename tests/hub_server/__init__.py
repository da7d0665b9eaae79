"""A small Hub for tests on 127.0.0.1: repositories, commits, branches, tags, pull requests, LFS, xet, access rules.

    PYTHONPATH=tests python -m hub_server --port 8801 --root hub_state [--xet]

The client reads its address and cache folder at import. So clients get them as arguments (`HfApi(endpoint=...)`,
`cache_dir=...`), or run in a process of their own with HF_ENDPOINT, HF_HOME and HF_TOKEN; HF_HUB_DISABLE_XET=1 as well
when the server runs without --xet.

State is on disk: the server may be killed and started again at the same root and port. Written against huggingface_hub
2.4.0 and hf_xet 1.8.0. A test double: there is no protection beyond the access rules that it imitates.
"""
