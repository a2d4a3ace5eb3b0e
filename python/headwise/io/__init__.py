"""Files: safetensors, writing whole or not at all, unfinished work, and what may be shown."""

from headwise.io.safetensors_files import (
    load_safetensors,
    read_safetensors_metadata,
    save_safetensors,
)
from headwise.io.store import Store

__all__ = ["Store", "load_safetensors", "read_safetensors_metadata", "save_safetensors"]
