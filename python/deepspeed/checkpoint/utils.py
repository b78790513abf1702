"""Helpers for clients that save state dictionaries themselves."""

from __future__ import annotations

from typing import Any

import torch


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """A copy of `item` (dicts, lists and tuples of anything) whose tensors own just their elements, on `device`.

    Views of a large flat storage would otherwise each be saved with the whole storage.
    """
    if isinstance(item, torch.Tensor):
        copy = item.detach().to(device)
        return copy.clone() if copy.data_ptr() == item.data_ptr() else copy
    if isinstance(item, dict):
        return type(item)((key, clone_tensors_for_torch_save(value, device)) for key, value in item.items())
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(clone_tensors_for_torch_save(value, device) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(clone_tensors_for_torch_save(value, device) for value in item)
    return item
