"""One student on several processes: rank and world from torchrun's environment, and what they agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from synthkd.engine.errors import SynthkdError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; rank 0 writes files and speaks."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all must ask at the same step."""
        if self.world == 1:
            return flag
        found = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def of_first(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's values, which the others must have in the same shapes."""
        if self.world == 1:
            return values
        out = {}
        for name, value in values.items():
            shared = value.to(self.device).contiguous()
            dist.broadcast(shared, 0)
            out[name] = shared.to(value.device)
        return out

    def texts(self, texts: dict[str, str]) -> dict[str, str]:
        """The tables of all processes, joined."""
        if self.world == 1:
            return texts
        found: list[dict[str, str]] = [{} for _ in range(self.world)]
        dist.all_gather_object(found, texts)
        return {key: value for table in found for key, value in table.items()}

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started, joined (gloo on a CPU, NCCL on GPUs); alone where it started none.

    Raises SynthkdError for an environment that names no place for this process.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield Ranks(device=device)
        return
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    cuda = device.startswith("cuda")
    if cuda and local >= torch.cuda.device_count():
        raise SynthkdError(f"torchrun: process {local} of this machine has no GPU; it has {torch.cuda.device_count()}")
    if cuda:
        torch.cuda.set_device(local)
    patience = timedelta(hours=2)  # the slowest part of a label file
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world, timeout=patience)
    try:
        yield Ranks(rank, world, f"cuda:{local}" if cuda else device)
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise SynthkdError(f"environment: {name} is {text!r}; expected a number, as torchrun sets it")
    return int(text)
