"""The monitors' blocks of a config, as attributes: `.tensorboard.enabled`, `.wandb.project`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from deepspeed._native import Config

BLOCKS = ("tensorboard", "csv_monitor", "wandb", "comet")


def monitor_settings(config: Config) -> SimpleNamespace:
    """The monitors' settings of a judged config; `enabled` says whether any monitor is on."""
    blocks = {name: SimpleNamespace(**config.block(name)) for name in BLOCKS}
    return SimpleNamespace(enabled=any(block.enabled for block in blocks.values()), **blocks)


def get_monitor_config(param_dict: dict[str, Any]) -> SimpleNamespace:
    """The same for a config that is a dict."""
    from deepspeed.runtime.config import judge

    return monitor_settings(judge({name: param_dict[name] for name in BLOCKS if name in param_dict}))
