"""Progress bars with rate and ETA, and a stop that waits for the end of a group."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from synthkd.engine.watch import TRY_AGAIN, end_process


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
    """Within it the first SIGTERM or interrupt asks for a stop after the group; the second acts at once.

    Signals are also read by a thread, so that the grace and a second signal hold while a kernel or a disk hangs, where
    no handler of Python's runs.
    """

    def __init__(self, grace: float | None = None) -> None:
        """grace: seconds from SIGTERM until the process is ended with exit code 75 all the same; None: no limit."""
        self._signal: int | None = None
        self._grace = grace
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> "StopFlag":
        """Take the signals over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._wakes = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._watch = threading.Thread(target=self._watched, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakes)
        self._over.set()
        os.close(self._writes)
        self._watch.join()
        os.close(self._reads)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:  # of a second one the watching thread makes the end
            self._signal = number
            sys.stderr.write("\nsynthkd: stopping at the next safe point; once more to stop at once\n")

    def _watched(self) -> None:
        """Told of every signal as it comes, by its number."""
        seen = 0
        while told := os.read(self._reads, 1):
            if told[0] not in self._before:
                continue
            seen += 1
            if seen > 1:
                end_process(_code(told[0]), "stopped at once; what is finished is safe, the same command goes on")
            if told[0] == signal.SIGTERM and self._grace is not None:
                threading.Thread(target=self._graced, args=(self._grace,), daemon=True).start()

    def _graced(self, seconds: float) -> None:
        if not self._over.wait(seconds):
            over = f"not at a safe point {seconds:g} s after SIGTERM (--grace)"
            end_process(TRY_AGAIN, f"{over}; what is finished is safe, the same command goes on")

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    def exit_code(self, console: Console, hint: str, unit: str = "group") -> int:
        """75 (try again) after SIGTERM, 130 after an interrupt; says so."""
        console.print(f"stopped after a whole {unit}; {hint}")
        return TRY_AGAIN if self._signal is None else _code(self._signal)


def _code(number: int) -> int:
    return 130 if number == signal.SIGINT else TRY_AGAIN
