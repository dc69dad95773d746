"""What a group is once it is drawn, and what anything must offer whose groups can be written to disk."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from synthkd.engine.plan import Plan, WorkUnit, sample_key


@dataclass(frozen=True)
class Preview:
    """A group's clean latents at a share of the run, decoded: one more image of each sample.

    images: uint8 [B,3,H,W]; targets: float32 [B,K], the label as it was at that call; notes: as a Batch's, of these
    images.
    """

    share: float
    images: Tensor
    targets: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """int64 [B]."""
        return self.targets.argmax(dim=1)

    def of(self, change: Callable[[Tensor], Tensor]) -> "Preview":
        """The same with every tensor changed."""
        notes = {name: change(note) for name, note in self.notes.items()}
        return Preview(self.share, change(self.images), change(self.targets), notes)


@dataclass(frozen=True)
class Batch:
    """The kept samples of one group.

    images: uint8 [B,3,H,W] on the device, an NCHW view of channels_last memory; labels: int64 [B];
    targets: float32 [B,K], the label as class shares (one-hot unless Latent CutMix crossed classes);
    notes: what the guidance's `annotate` gave, [B,...]; curves: per logged term one value per guided call
    (group terms) or one per call and sample; seconds: per stage; previews: extra images of the same samples, in the
    order of the run (ids, keys and counts are of the finished images alone); sources: keys of the images that the
    samples were made from, where they were; environment: where the group was drawn (see `engine.environment`), empty
    for the stream's.
    """

    group: int
    round: int
    attempt: int
    ids: tuple[int, ...]
    prompts: tuple[str, ...]
    images: Tensor
    labels: Tensor
    targets: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    previews: tuple[Preview, ...] = ()
    sources: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Sample names, as in a shard."""
        return [sample_key(i) for i in self.ids]

    def first(self, kept: int) -> "Batch":
        """The first `kept` samples."""
        if kept == len(self.ids):
            return self
        per_sample = {n: [c[:kept] if isinstance(c, list) else c for c in v] for n, v in self.curves.items()}
        return replace(
            self,
            ids=self.ids[:kept],
            prompts=self.prompts[:kept],
            images=self.images[:kept],
            labels=self.labels[:kept],
            targets=self.targets[:kept],
            notes={name: note[:kept] for name, note in self.notes.items()},
            curves=per_sample,
            previews=tuple(preview.of(lambda x: x[:kept]) for preview in self.previews),
            sources=self.sources[:kept],
        )

    def cpu(self) -> "Batch":
        """The same in host memory."""
        return replace(
            self,
            images=self.images.cpu(),
            labels=self.labels.cpu(),
            targets=self.targets.cpu(),
            notes={name: note.cpu() for name, note in self.notes.items()},
            previews=tuple(preview.of(Tensor.cpu) for preview in self.previews),
        )


class SampleStream(Protocol):
    """What `write_shards` consumes: a plan, its identity, and a way to draw any of its units in order."""

    @property
    def plan(self) -> Plan:
        """The plan that is drawn."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """The manifest's content: recipe, seed, guidance, model digest, fingerprint, versions."""
        ...

    @property
    def environment(self) -> dict[str, Any]:
        """Where it is drawn (see `engine.environment`)."""
        ...

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """One Batch per unit, in the given order."""
        ...
