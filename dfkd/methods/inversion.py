"""What methods that invert a teacher share: shifted looks at a group, one compiled step, redrawing, refusals."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils.flop_counter import FlopCounterMode

from synthkd.dfkd.methods.base import MethodJob
from synthkd.dfkd.methods.growing import group_batch
from synthkd.dfkd.teachers import Teacher
from synthkd.engine import rng
from synthkd.engine.batch import Batch
from synthkd.engine.errors import NonFiniteError, SynthkdError
from synthkd.engine.plan import WorkUnit
from synthkd.kernels import to_uint8

ATTEMPTS = 3  # at a group that is not finite, as a Recipe's


class Jitter(NamedTuple):
    """Where the pixels of a moved group come from, for each of n steps: rows int64 [n,H], columns int64 [n,W]."""

    rows: Tensor
    columns: Tensor

    @staticmethod
    def drawn(
        seed: int, unit: WorkUnit, attempt: int, steps: int, size: tuple[int, int], reach: int, flip: bool
    ) -> "Jitter":
        """Every step moves the group by up to `reach` pixels each way, what leaves coming in again on the other side.

        And mirrors it half of the time where `flip` says so (arXiv 1912.08795, sec. 4.1).
        """
        u = rng.uniform(seed, unit.group, "jitter", 3 * steps, attempt).reshape(3, steps, 1)
        shifts = np.floor(u[:2] * (2 * reach + 1)).astype(np.int64) - reach
        rows = (np.arange(size[0]) + shifts[0]) % size[0]
        columns = (np.arange(size[1]) + shifts[1]) % size[1]
        if flip:
            columns = np.where(u[2] < 0.5, columns[:, ::-1], columns)
        return Jitter(torch.from_numpy(rows), torch.from_numpy(columns.copy()))

    def to(self, device: torch.device) -> "Jitter":
        """The same on a device."""
        return Jitter(self.rows.to(device), self.columns.to(device))

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of one step."""
        return self.rows[step], self.columns[step]


def moved(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images [B,C,H,W] as one step sees them; indices, not numbers, so that every step has the same graph."""
    return images.index_select(2, rows).index_select(3, columns)


def normal(seed: int, unit: WorkUnit, purpose: str, shape: tuple[int, ...], attempt: int, device: Any) -> Tensor:
    """Standard normal float32 [B,*shape], each sample's a function of (seed, id, purpose, attempt)."""
    count = int(np.prod(shape))
    rows = [rng.normal(seed, i, purpose, count, attempt) for i in unit.ids]
    return torch.from_numpy(np.stack(rows)).view(len(rows), *shape).to(device)


class OneGraph:
    """A function of tensors as one graph where the job compiles; its gradient is taken outside of it."""

    def __init__(self, job: MethodJob, call: Callable[..., Any], calls: int) -> None:
        """calls: how often it will be called, as often again backwards."""
        self.job, self.calls, self._plain = job, calls, call
        self._call: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The function; raises SynthkdError where torch cannot compile it."""
        if self._call is None:
            self._call = self._made(*arguments)
        try:
            return self._call(*arguments)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise SynthkdError(
                f"method {self.job.name}: torch cannot compile its step here ({reason}); set --compile off"
            ) from error

    def _made(self, *arguments: Any) -> Callable[..., Any]:
        with FlopCounterMode(display=False) as count, torch.no_grad():
            self._plain(*arguments)
        mode = self.job.how.compile_mode(3.0 * count.get_total_flops() * self.calls, self.calls)
        if mode in ("reduce-overhead", "max-autotune"):  # what they return is written over by the next call
            mode = "default"
        if mode is None:
            return self._plain
        made: Callable[..., Any] = torch.compile(self._plain, mode=mode, fullgraph=True, dynamic=False)
        return made


def need_statistics(job: MethodJob, weight: float) -> None:
    """Raise SynthkdError for a statistics term on a teacher that has none."""
    if weight and not job.teacher.has_statistics:
        raise SynthkdError(
            f"method {job.name}: the teacher has no BatchNorm and no stored moments to compare with; set bn to 0"
        )


def redrawn(job: MethodJob, unit: WorkUnit, draw: Callable[[int], Tensor | None]) -> Batch:
    """The group's images in [0,1] of the first attempt that is finite, as a Batch.

    draw: attempt -> images [B,3,H,W], or None. Raises NonFiniteError after ATTEMPTS of them.
    """
    for attempt in range(ATTEMPTS):
        if (images := draw(attempt)) is not None:
            labels = torch.tensor(unit.classes, device=images.device)
            made = group_batch(unit, to_uint8(images.detach()), labels, len(job.teacher.classes))
            return replace(made, attempt=attempt)
    raise NonFiniteError(
        f"method {job.name}: group {unit.group} was not finite in {ATTEMPTS} attempts; nothing of it was written. "
        "Lower its learning rates or the weights of its losses"
    )


def device_of(teacher: Teacher) -> torch.device:
    """Where a teacher is."""
    return teacher.get_buffer("mean").device
