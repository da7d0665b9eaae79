"""Mixture-of-Experts for the Hugging Face stack. Importing registers the `hf_moe` architecture; it patches nothing."""

from hf_moe.registration import register

__version__ = "0.1.0"

register()
