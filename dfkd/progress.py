"""Who is told what goes on during a long job."""

from typing import Protocol


class Progress(Protocol):
    """Told what goes on: a stage begins with a total, advances, and ends."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage of `total` units starts."""
        ...

    def advance(self, stage: str, count: int) -> None:
        """`count` more units are done."""
        ...

    def note(self, stage: str, text: str) -> None:
        """Words beside a stage."""
        ...

    def end(self, stage: str) -> None:
        """The stage is over."""
        ...


class Silent:
    """A Progress that says nothing."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, stage: str, count: int) -> None:
        """Nothing."""

    def note(self, stage: str, text: str) -> None:
        """Nothing."""

    def end(self, stage: str) -> None:
        """Nothing."""
