"""Progress bars with rate and ETA, and a stop that waits for the end of a group."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Units per second so far."""

    def render(self, task: Task) -> Text:
        """What the stage says of itself, else the rate of work done in this run, without what was there already."""
        if task.fields["note"]:
            return Text(str(task.fields["note"]), style="cyan")
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {task.fields['unit']}/s", style="cyan")


class Bars:
    """A run's Progress as Rich bars, one per stage."""

    def __init__(self, console: Console) -> None:
        """console: where the bars are drawn."""
        self._bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Leave them on the screen."""
        self._bars.stop()

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage of `total` units starts."""
        self._tasks[stage] = self._bars.add_task(stage.replace("_", " "), total=total, unit=unit, note="")

    def advance(self, stage: str, count: int) -> None:
        """`count` more units are done."""
        self._bars.advance(self._tasks[stage], count)

    def note(self, stage: str, text: str) -> None:
        """Words beside a stage's bar, in place of its rate."""
        self._bars.update(self._tasks[stage], note=text)

    def end(self, stage: str) -> None:
        """The stage is over."""
        self._bars.stop_task(self._tasks[stage])


class StopFlag:
    """Within it the first SIGTERM or interrupt asks for a stop after the group; the second acts at once."""

    def __init__(self) -> None:
        """No stop is asked for yet."""
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        """Take the signals over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        sys.stderr.write("\nsynthkd: stopping at the next safe point; once more to stop at once\n")
        for taken, handler in self._before.items():
            signal.signal(taken, handler)

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    def exit_code(self, console: Console, hint: str, unit: str = "group") -> int:
        """75 (try again) after SIGTERM, 130 after an interrupt; says so."""
        console.print(f"stopped after a whole {unit}; {hint}")
        return 130 if self._signal == signal.SIGINT else 75
