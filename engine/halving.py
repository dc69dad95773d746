"""A group that does not fit the memory after all: the same group once more, in parts of half the size."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from synthkd.engine.config import Recipe
from synthkd.engine.errors import SynthkdError
from synthkd.engine.memory import MemoryPlan

Drawn = TypeVar("Drawn")

_log = logging.getLogger("synthkd")
_SAID = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator says so by its type; libraries, compilers and torch on a CPU in words."""
    typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return typed or (isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID))


def halved(plan: MemoryPlan, splits: bool = True) -> MemoryPlan | None:
    """Half the samples at a time through every pass, rounded up; None where each takes as few as it can.

    splits: whether the guidance can be taken in parts; one that cannot keeps the whole group.
    """
    half = replace(
        plan,
        denoise=-(-plan.denoise // 2),
        guide=-(-plan.guide // 2) if splits else plan.guide,
        decode=-(-plan.decode // 2),
        reason="out of memory",
    )
    return None if half.key == plan.key else half


def smaller_plan(plan: MemoryPlan, group: int, splits: bool, strict_bits: bool) -> MemoryPlan | None:
    """The plan from a group on that did not fit, with a warning; None where nothing is left to halve.

    Raises SynthkdError where smaller parts are not allowed, since they move last bits.
    """
    half = halved(plan, splits)
    if half is None:
        return None
    if strict_bits:
        raise SynthkdError(
            f"group {group}: out of memory in parts of {plan.key} (denoiser/guidance/decoder), and --strict-bits "
            "allows no smaller ones; every finished group is safe: leave it out, or free memory and try again"
        )
    _log.warning("group %d: out of memory in parts of %s; parts of %s from here on", group, plan.key, half.key)
    return half


def fitting(draw: Callable[[], Drawn], shrink: Callable[[], bool], recipe: Recipe, device: torch.device) -> Drawn:
    """What `draw` returns; where it runs out of memory, `shrink` is asked for less, and it is called again.

    The error is let go before that, and with it the tensors that its frames hold.
    Raises SynthkdError, which says what to lower, where `shrink` finds nothing smaller.
    """
    while True:
        try:
            return draw()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if not shrink():
                raise _too_large(recipe) from error
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _too_large(recipe: Recipe) -> SynthkdError:
    return SynthkdError(
        f"a group of {recipe.group_size} images of {recipe.height}x{recipe.width} does not fit the "
        "memory; lower classes_per_group or samples_per_class, set guidance.looks to 1, use "
        "guidance.gradient 'x0' or a tiny guidance decoder, or dtype 'bfloat16'"
    )
