"""Saving a model with its gates, plans and masks as a folder, and loading it."""

from headwise.serialization.card import model_card, write_card
from headwise.serialization.save_load import load, save

__all__ = ["load", "model_card", "save", "write_card"]
