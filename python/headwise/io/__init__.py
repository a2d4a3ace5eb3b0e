"""Files: safetensors, atomic writing, checkpoints of unfinished work, and printable text."""

from headwise.io.safetensors_files import (
    load_safetensors,
    read_safetensors_metadata,
    save_safetensors,
)
from headwise.io.store import Store

__all__ = ["Store", "load_safetensors", "read_safetensors_metadata", "save_safetensors"]
