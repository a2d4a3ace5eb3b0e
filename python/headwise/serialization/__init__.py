"""Saving a model with its gates, plans and masks as a folder, loading it, and exporting it."""

from headwise.serialization.card import model_card, write_card
from headwise.serialization.export import export_onnx, plain_program
from headwise.serialization.for_transformers import save_for_transformers
from headwise.serialization.save_load import load, save

__all__ = [
    "export_onnx",
    "load",
    "model_card",
    "plain_program",
    "save",
    "save_for_transformers",
    "write_card",
]
