"""Replacing a model's attention by layers that choose their heads."""

from headwise.convert.adapters import qkv
from headwise.convert.conversion import convert
from headwise.convert.registry import Architecture, register_architecture

__all__ = ["Architecture", "convert", "qkv", "register_architecture"]
