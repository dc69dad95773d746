"""The loop that both stages of a prior's training share: averaged weights, checkpoints, a log, a time limit."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.dfkd.progress import Progress
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.training import Stopped
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically

LOG = "log.jsonl"
SAVE_SECONDS = 120.0
_EVERY, _HELD_PARTS = 50, 10
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
_LOWEST = 0.02  # of the learning rate, at the end


def generator_of(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random numbers of one step, on the host: the same on every device and after every kill."""
    digest = hashlib.blake2b(f"{purpose} {step} {seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)


def moved(tensor: Tensor, device: str) -> Tensor:
    """A host tensor on a device; a GPU gets it without a wait, from page-locked memory."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where a network computes; float32 on a GPU that has none."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cuda" or torch.cuda.is_bf16_supported())


def checkpoint_of(folder: Path, stage: str) -> Path:
    """Where a stage keeps what it goes on from."""
    return folder / f"{stage}.checkpoint.safetensors"


def is_of(note: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a file's note agrees with all fields of a stage's identity; others, of other stages, do not count."""
    found = note.get("identity")
    return isinstance(found, dict) and all(name in found and found[name] == value for name, value in identity.items())


@dataclass(frozen=True)
class StagePlan:
    """slower: beginnings of parameters' names -> factor of their learning rate; command: how errors begin."""

    name: str
    steps: int
    learning_rate: float
    warmup_steps: int
    ema: float
    batch_size: int
    slower: Mapping[str, float] = field(default_factory=dict)
    command: str = "fit-prior"

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine (arXiv 1608.03983, eq. 5) to a fiftieth."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * (_LOWEST + (1 - _LOWEST) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


class StageLoop:
    """One stage: `module` is what learns (compiled on a GPU), and `run` gives its averaged weights back."""

    def __init__(
        self,
        plan: StagePlan,
        net: nn.Module,
        folder: Path,
        identity: Mapping[str, Any],
        device: str,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        """net: new weights, or any where the folder has a checkpoint. Raises SynthkdError for one of another run.

        identity: what the stage is a function of.
        """
        self._plan, self._folder, self._identity, self._device = plan, folder, dict(identity), device
        self._progress, self._should_stop = progress, should_stop
        self._live = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._live.train()
        self._ema = deepcopy(self._live).requires_grad_(False).eval()
        self._cuda = torch.device(device).type == "cuda"
        self._adam = torch.optim.AdamW(
            self._groups(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=self._cuda or None
        )
        self._step, self._seconds = 0, 0.0
        self.figures: dict[str, Any] = {}
        self._resume()
        self._restart_window()
        self.module = torch.compile(self._live) if self._cuda else self._live

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by the factor of their learning rate: few groups, so that an optimizer step is few launches."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in self._live.named_parameters():
            factor = next((f for start, f in self._plan.slower.items() if name.startswith(start)), 1.0)
            groups.setdefault(factor, []).append(p)
        return [{"params": params, "factor": factor} for factor, params in groups.items()]

    def _resume(self) -> None:
        path = checkpoint_of(self._folder, self._plan.name)
        if not path.is_file():
            self._cut_log(0)
            return
        tensors, note = read_tensors(path)
        if not is_of(note, self._identity):
            raise SynthkdError(f"{path}: is of another pool or spec; choose another folder, or delete this one")
        try:
            self._load(tensors, note)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise SynthkdError(f"{path}: does not fit ({reason}); delete it and run the command again") from error
        self._cut_log(self._step)

    def _load(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Weights, averages and AdamW's moments, in the memory layout of the parameters."""
        for kind, net in (("live", self._live), ("ema", self._ema)):
            net.load_state_dict({n[len(kind) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{kind}.")})
        self._step, self._seconds = int(note["step"]), float(note["seconds"])
        self.figures = dict(note.get("figures", {}))
        for name, p in self._live.named_parameters():
            moments = {kind: torch.empty_like(p).copy_(tensors[f"{kind}.{name}"]) for kind in _MOMENTS}
            counted = torch.tensor(float(self._step), device=p.device if self._cuda else "cpu")  # fused: on the device
            self._adam.state[p] = {"step": counted, **moments}

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for kind, net in (("live", self._live), ("ema", self._ema)):
            tensors |= {f"{kind}.{name}": value for name, value in net.state_dict().items()}
        for name, p in self._live.named_parameters():
            state = self._adam.state[p]
            tensors |= {f"{kind}.{name}": state[kind] for kind in _MOMENTS}
        note = {"identity": self._identity, "step": self._step, "seconds": self._seconds, "figures": self.figures}
        write_tensors(checkpoint_of(self._folder, self._plan.name), tensors, note)

    def run(self, loss: Callable[[int], Tensor], held: Callable[[Any], dict[str, float]]) -> Any:
        """Take the steps that are left and return the averaged network, frozen.

        loss: of a step's batch by `module`; held: figures of the averaged network on images that are held out. Raises
        Stopped after a checkpoint, and SynthkdError for a loss that is not finite.
        """
        plan, told = self._plan, self._progress
        told.begin(plan.name, plan.steps, "steps")
        told.advance(plan.name, self._step)
        began, saved = time.monotonic() - self._seconds, time.monotonic()
        while self._step < plan.steps:
            self._total += self._one(loss)
            self._counted += 1
            last = self._step == plan.steps
            if last or self._step % _EVERY == 0:
                self._note(held, began, last)
            told.advance(plan.name, 1)
            stop = self._should_stop()
            if stop or last or time.monotonic() - saved > SAVE_SECONDS:
                self._seconds = time.monotonic() - began
                self._save()
                saved = time.monotonic()
            if stop:
                told.end(plan.name)
                raise Stopped
        told.end(plan.name)
        return self._ema

    def _one(self, loss: Callable[[int], Tensor]) -> Tensor:
        """One step; its loss, on the device."""
        rate = self._plan.rate(self._step)
        for group in self._adam.param_groups:
            group["lr"] = rate * group["factor"]
        with autocast(self._device):
            found = loss(self._step)
        found.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._live.parameters(), 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._step += 1
        decay = min(self._plan.ema, self._step / (self._step + 9))
        averaged, live = list(self._ema.parameters()), [p.detach() for p in self._live.parameters()]
        torch._foreach_lerp_(averaged, live, 1 - decay)
        return found.detach()

    def _restart_window(self) -> None:
        """Begin the steps of the next row of the log."""
        self._total, self._counted = torch.zeros((), device=self._device), 0
        self._since = time.monotonic()

    def _note(self, held: Callable[[Any], dict[str, float]], began: float, last: bool) -> None:
        """A row of the log; what is held out is looked at now and then, and at the end."""
        plan, row = self._plan, self._row()
        if last or self._step % _held_every(plan.steps) == 0:
            row |= held(self._ema)
        self._seconds = time.monotonic() - began
        self._log(row | {"seconds": round(self._seconds, 2)})
        if last:
            mean = plan.steps * plan.batch_size / max(self._seconds, 1e-9)
            about = {"seconds": round(self._seconds, 2), "images_per_second": round(mean, 1)}
            self.figures = {"steps": plan.steps, "batch_size": plan.batch_size, **row, **about}
        self._restart_window()

    def _row(self) -> dict[str, float]:
        mean = float(self._total) / self._counted
        if not math.isfinite(mean):
            plan, checkpoint = self._plan, checkpoint_of(self._folder, self._plan.name)
            raise SynthkdError(
                f"{plan.command}: the loss of the {plan.name} is not finite at step {self._step}; lower its learning "
                f"rate and delete {checkpoint}"
            )
        rate = self._counted * self._plan.batch_size / max(time.monotonic() - self._since, 1e-9)
        return {"loss": round(mean, 5), "images_per_second": round(rate, 1)}

    def _log(self, row: dict[str, float]) -> None:
        line = json.dumps({"stage": self._plan.name, "step": self._step, **row})
        with (self._folder / LOG).open("a") as f:
            f.write(line + "\n")
        self._progress.note(self._plan.name, f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s")

    def _cut_log(self, step: int) -> None:
        """Drop this stage's rows of steps that are taken again, and a line that a kill left half."""
        rows = [row for row in read_log(self._folder) if row["stage"] != self._plan.name or row["step"] <= step]
        if (self._folder / LOG).is_file():
            write_atomically(self._folder / LOG, "".join(json.dumps(row) + "\n" for row in rows))


def _held_every(steps: int) -> int:
    """Steps between two looks at what is held out: a tenth of all, in whole rows of the log."""
    return max(_EVERY, steps // _HELD_PARTS // _EVERY * _EVERY)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of a training's log, without lines that cannot be read."""
    path, rows = folder / LOG, []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows.append({**row, "stage": str(row["stage"]), "step": int(row["step"])})
    return rows
