"""The `DeepSpeed` logger and `log_dist`. The root logger is never touched."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class _CurrentStdout(logging.StreamHandler[Any]):
    """Writes to whatever sys.stdout is at the time, so that redirection and capture work."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, _value: Any) -> None:
        pass


def _create(name: str, level: int) -> logging.Logger:
    created = logging.getLogger(name)
    if created.level == logging.NOTSET:
        created.setLevel(level)
    if not created.handlers:
        handler = _CurrentStdout()
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [deepspeed] %(message)s"))
        created.addHandler(handler)
        created.propagate = False
    return created


logger: logging.Logger = _create("DeepSpeed", logging.WARNING)


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Logs `message` on the given ranks; on all of them when `ranks` is None, empty or contains -1.

    A process outside any process group counts as rank 0.
    """
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, "[Rank %d] %s", rank, message)


@functools.cache
def warning_once(message: str) -> None:
    """Logs a warning the first time this message is seen in the process."""
    logger.warning(message)


def set_log_level_from_string(log_level: str, custom_logger: logging.Logger | None = None) -> None:
    """Sets a logger's level by name: debug, info, warning, error or critical."""
    name = log_level.lower()
    if name not in LOG_LEVELS:
        raise ValueError(f"unknown log level {log_level!r}, expected one of {', '.join(LOG_LEVELS)}")
    (custom_logger or logger).setLevel(LOG_LEVELS[name])


def should_log_le(max_log_level_str: str) -> bool:
    """Whether the logger's level is at or below the named one."""
    name = max_log_level_str.lower()
    if name not in LOG_LEVELS:
        raise ValueError(f"unknown log level {max_log_level_str!r}, expected one of {', '.join(LOG_LEVELS)}")
    return logger.getEffectiveLevel() <= LOG_LEVELS[name]
