"""Placeholder until the TensorRT branch lands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "model.engine"


def unavailable() -> str:
    """Why it cannot be used."""
    return "TensorRT is not installed; pip install 'synthkd[tensorrt]'"


def version() -> str:
    """Of the library."""
    return ""


def build_engine(*args: Any, **kwargs: Any) -> None:
    """Not yet."""
    raise NotImplementedError


class Arena:
    """Not yet."""

    def __init__(self, device: Any) -> None:
        """Not yet."""


class Engine:
    """Not yet."""

    def __init__(self, *args: Any) -> None:
        """Not yet."""

    def __call__(self, tensors: Any) -> Any:
        """Not yet."""
        raise NotImplementedError


_ = Callable, Path
