"""Model cards from facts, and pushes of whole models to the Hub."""

from hf_moe.hub.cards.card import model_card, write_card

__all__ = ["model_card", "write_card"]
