"""What a method of data-free distillation is: a source of labelled image batches that may learn while the student does.

A method is a function of a MethodJob that returns a MethodFeed. It is found by name through the entry-point group
`synthkd.methods`, so that a package of its own can bring one (docs/methods.md). `check_NAME` beside the function NAME,
if there is one, takes the same job and raises SynthkdError where the method would refuse it, before anything is made.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from synthkd.dfkd import plugins
from synthkd.dfkd.apart import check_pool
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.feed import Feed, Source
from synthkd.dfkd.fields import Kind, check_fields
from synthkd.dfkd.pools import Pool, open_pool
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.sets import SetSource
from synthkd.dfkd.student import SetFeed
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.train_options import TrainOptions
from synthkd.engine.errors import SynthkdError

GROUP = "synthkd.methods"
_OWN = {
    **{name: f"synthkd.dfkd.methods.plain:{name}" for name in ("diffdfkd", "diffusion", "pool")},
    **{name: f"synthkd.dfkd.methods.{name}:{name}" for name in ("dda", "deepinversion", "fastdfkd", "mosaickd")},
}
Options = TypeVar("Options")


class MethodFeed(Feed, Protocol):
    """A Feed, and what a run wants to know of it.

    held: uint8 [M,3,h,w] on the CPU, never trained on, for the agreement of student and teacher; reading, damaged: as
    `Training` has them. What a batch hangs on beside its step is in `state`, so that a killed run ends in the same
    student.
    """

    held: Tensor

    @property
    def made(self) -> int:
        """Synthetic images that the student can see; what a method draws and throws away is not among them."""
        ...

    @property
    def reading(self) -> Mapping[str, str]:
        """Which reader and decoder images come from."""
        ...

    @property
    def damaged(self) -> dict[str, str]:
        """What could not be read, by key."""
        ...

    def close(self) -> None:
        """Give back what the feed holds."""
        ...


@dataclass(frozen=True, kw_only=True)
class MethodJob:
    """What a method is given.

    spec: of the student; num_images: synthetic images it may make; folder: of the run, a set goes to its `shards`;
    teacher: frozen; student: the network that learns while batches are taken, to be looked through and never changed;
    how: execution; options: the method's own settings as plain values; pool: as `open_pool` takes it, None for none.
    notes: what a result says beside the scores, such as which pool was opened.
    """

    preset: Preset
    spec: DistillSpec
    num_images: int
    folder: Path
    teacher: Teacher
    student: Teacher
    how: TrainOptions
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: str | None = None
    workers: int | None = None
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.spec.seed

    @property
    def shards(self) -> Path:
        """Folder of the synthetic set."""
        return self.folder / "shards"

    def settings(self, kind: type[Options], kinds: Mapping[str, Kind]) -> Options:
        """The options as a dataclass; kinds: what each field may be.

        Raises SynthkdError for one that the method does not have, of the wrong type or out of range.
        """
        where = f"method {self.name}"
        check_fields(where, self.options, kinds)
        made: Any = kind
        floats = {f.name for f in fields(made) if f.type is float}
        return made(**{n: float(v) if n in floats else v for n, v in self.options.items()})

    def need_classifier(self) -> None:
        """Raise SynthkdError for a dense teacher: for methods that make images of one class."""
        if self.teacher.dense:
            raise SynthkdError(
                f"method {self.name}: makes images of one class each, and the teacher is of the task 'segmentation'; "
                "use mosaickd or pool"
            )

    def opened_pool(self) -> Pool:
        """The out-of-domain images with the teacher's word on them; raises SynthkdError where the job has no pool."""
        if self.pool is None:
            raise SynthkdError(
                f"method {self.name}: needs out-of-domain images; give --pool a folder of images or of tar shards, an "
                ".npz of x, or embedded:digits/pool"
            )
        check_pool(self.pool, self.preset.job.teacher)
        self.notes["pool"] = self.pool
        return open_pool(self.pool, self.teacher, self.how, keep=self.folder, progress=self.progress)

    def set_feed(self, source: Source, spec: DistillSpec | None = None) -> MethodFeed:
        """Batches of a finished set, guided or not, in the order and views of the spec."""
        feed = SetFeed.opened(
            source, self.teacher, spec or self.spec, self.how, folder=self.folder, labels_root=self.shards
        )
        feed.made = int((~source.previews).sum()) if isinstance(source, SetSource) else 0  # a pool's were not made
        return feed


Method = Callable[[MethodJob], MethodFeed]


def method_names() -> list[str]:
    """Installed methods."""
    return plugins.names_of(GROUP, _OWN)


def load_method(name: str) -> Method:
    """A method by name; raises SynthkdError with the nearest right one."""
    made: Method = plugins.load(GROUP, _OWN, name, "method")
    return made


def check_method(job: MethodJob) -> None:
    """Raise SynthkdError for a method that is not known, or a job that its `check_NAME` refuses; nothing is made."""
    make = load_method(job.name)
    module = sys.modules.get(getattr(make, "__module__", ""))
    check: Callable[[MethodJob], object] | None = getattr(module, f"check_{getattr(make, '__name__', '')}", None)
    if check is not None:
        check(job)
