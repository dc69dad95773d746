"""What a run of `synthkd bench distill` is asked for, its variants by name, and what each of them becomes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from synthkd.dfkd.feed import ReadOptions

READ, STEP, END = "read", "step", "end-to-end"
STAGES = (READ, STEP, END)
READ_BAR, STEP_BAR, WAIT_BAR = 3.0, 1.3, 3.0  # times the reference; the last in percent of time waited, on a GPU


@dataclass(frozen=True)
class Sized:
    """How images are read at one size.

    stored: a side of the files; crop: least share of the area (1: whole images); batch, images: of one round, on a CPU
    and on a GPU.
    """

    stored: int
    crop: float
    batch: tuple[int, int]
    images: tuple[int, int]


SIZES: Mapping[int, Sized] = {
    32: Sized(stored=32, crop=1.0, batch=(128, 512), images=(4096, 49152)),
    224: Sized(stored=256, crop=0.25, batch=(64, 128), images=(768, 4096)),
}


@dataclass(frozen=True)
class Reading:
    """A reader of ours; gpu: pays on a GPU alone."""

    reader: str
    cache: str = "off"
    threads: int = 0
    gpu: bool = False

    def options(self, device: torch.device, crops: bool) -> ReadOptions:
        """As a training reads."""
        return ReadOptions(
            reader=self.reader, cache=self.cache, threads=self.threads, device=str(device), crops=crops, strict=True
        )


# The first of each stage is the reference. None: not a reader of ours, but `distill_references.pillow_loader`.
READERS: Mapping[str, Reading | None] = {
    "pil-dataloader": None,
    "torch": Reading("torch"),
    "torch-1-thread": Reading("torch", threads=1),
    "dali": Reading("dali"),
    "dali-1-thread": Reading("dali", threads=1),
    "cached": Reading("torch", cache="memory"),
    "cached-on-gpu": Reading("torch", cache="device", gpu=True),
}


@dataclass(frozen=True)
class Stepping:
    """How `dfkd.step.Step` runs. mode: of torch.compile, None for eager."""

    dtype: torch.dtype = torch.float32
    mode: str | None = None


STEPS: Mapping[str, Stepping | None] = {
    "plain-eager": None,
    "eager": Stepping(),
    "compiled": Stepping(mode="default"),
    "bfloat16": Stepping(torch.bfloat16),
    "compiled-bfloat16": Stepping(torch.bfloat16, "default"),
}


@dataclass(frozen=True)
class Ending:
    """How `dfkd.student.distill` is called; gpu: is measured on a GPU unless it is asked for."""

    soft_labels: str
    cache: str = "auto"
    gpu: bool = False


ENDS: Mapping[str, Ending] = {
    "teacher-in-the-loop": Ending("teacher"),
    "stored-labels": Ending("stored"),
    "stored-labels-uncached": Ending("stored", cache="off", gpu=True),
}


def variants_of(stage: str) -> tuple[str, ...]:
    """Names of a stage's variants, the reference first."""
    return tuple({READ: READERS, STEP: STEPS, END: ENDS}[stage])


@dataclass(frozen=True, kw_only=True)
class DistillBench:
    """What is measured: all where a field is empty or None.

    students: names of `distill_cases.STUDENTS`, or students of its PAIRS; rounds, images, batch_size, steps: a stage's
    own by default; workers: processes of the Pillow loader, threads of torch are left as they are.
    """

    device: torch.device
    stages: Sequence[str] = ()
    sizes: Sequence[int] = ()
    variants: Sequence[str] = ()
    students: Sequence[str] = ()
    rounds: int | None = None
    images: int | None = None
    batch_size: int | None = None
    steps: int | None = None
    workers: int = 2
    image_format: str = "jpg"

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.type == "cuda"

    def chosen(self, stage: str) -> list[str]:
        """Variants in their order; the reference is always one: the others are compared with it."""
        reference, *others = variants_of(stage)
        made: Mapping[str, Any] = {READ: READERS, STEP: STEPS, END: ENDS}[stage]
        usual = [name for name in others if self.cuda or not getattr(made[name], "gpu", False)]
        return [reference, *(n for n in others if n in (self.variants or usual))]


@dataclass
class Entry:
    """One variant, warm, or why it is not: skipped (not there) or failed.

    run: one round, images per second; facts: what else its row holds; rates: by round.
    """

    run: Callable[[], float] | None = None
    skipped: str | None = None
    failed: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether it has something to time."""
        return self.run is not None and self.failed is None


@contextmanager
def attempted(entry: Entry) -> Iterator[None]:
    """An error inside is the entry's own: the others are still measured."""
    try:
        yield
    except Exception as error:  # memory, a compiler, a decoder
        entry.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
