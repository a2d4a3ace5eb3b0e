"""Files: safetensors, atomic writing, and the journals of work that goes on after a break."""

from headwise.io.journal import Journal
from headwise.io.safetensors_files import (
    load_safetensors,
    read_safetensors_metadata,
    save_safetensors,
)

__all__ = ["Journal", "load_safetensors", "read_safetensors_metadata", "save_safetensors"]
