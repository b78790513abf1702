"""Helpers around checkpoints. Saving and loading are methods of the engine."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__, submodules=("constants", "ds_to_universal", "export_script", "universal_checkpoint", "utils")
)
