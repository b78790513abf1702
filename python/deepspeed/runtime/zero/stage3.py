"""Estimates of memory at stage 3. The figures are those of this engine's memory plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed import _native
from deepspeed.runtime.zero.stage_1_and_2 import elements

if TYPE_CHECKING:
    import torch


def estimate_zero3_model_states_mem_needs(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """(bytes of host memory per node, bytes of memory per GPU, bytes of the largest layer) for weights, gradients and
    optimizer state."""
    return _native.estimate_zero3(
        int(total_params),
        int(largest_layer_params),
        num_gpus_per_node,
        num_nodes,
        additional_buffer_factor,
        cpu_offload,
        cpu_offload_params,
        zero_init,
    )


def estimate_zero3_model_states_mem_needs_all_live(
    model: torch.nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Prints the estimates of every case for `model`."""
    layers = (elements(module.parameters(recurse=False)) for module in model.modules())
    estimate_zero3_model_states_mem_needs_all_cold(
        elements(model.parameters()), max(layers), num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Prints the estimates of every case for a model of `total_params` elements, `largest_layer_params` of them in its
    largest layer."""
    table = _native.zero3_table(
        int(total_params), int(largest_layer_params), num_gpus_per_node, num_nodes, additional_buffer_factor
    )
    print(table, end="")
