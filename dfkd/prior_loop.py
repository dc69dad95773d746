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
_EVERY, _HELD_PARTS, _SAVE_SECONDS = 50, 10, 120.0
_LOWEST = 0.02  # of the learning rate, at the end


def generator_of(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random numbers of one step, on the host: the same on every device and after every kill."""
    digest = hashlib.blake2b(f"{purpose} {step} {seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)


def autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where a network computes; float32 on a GPU that has none."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cuda" or torch.cuda.is_bf16_supported())


def checkpoint_of(folder: Path, stage: str) -> Path:
    """Where a stage keeps what it goes on from."""
    return folder / f"{stage}.checkpoint.safetensors"


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
        """net: new weights, or any where the folder has a checkpoint. Raises SynthkdError for one of another run."""
        self._plan, self._folder, self._identity, self._device = plan, folder, dict(identity), device
        self._progress, self._should_stop = progress, should_stop
        self._live = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._live.train()
        self._ema = deepcopy(self._live).requires_grad_(False).eval()
        named = dict(self._live.named_parameters())
        self._factors = [self._factor(name) for name in named]
        groups = [{"params": [p]} for p in named.values()] if plan.slower else list(named.values())
        self._adam = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
        self._step, self._seconds = 0, 0.0
        self.figures: dict[str, Any] = {}
        self._resume()
        self.module = torch.compile(self._live) if torch.device(device).type == "cuda" else self._live

    def _factor(self, name: str) -> float:
        return next((f for start, f in self._plan.slower.items() if name.startswith(start)), 1.0)

    def _resume(self) -> None:
        path = checkpoint_of(self._folder, self._plan.name)
        if not path.is_file():
            self._cut_log(0)
            return
        tensors, note = read_tensors(path)
        if note.get("identity") != self._identity:
            raise SynthkdError(f"{path}: is of another pool or spec; choose another folder, or delete this one")
        for kind, net in (("live", self._live), ("ema", self._ema)):
            net.load_state_dict({n[len(kind) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{kind}.")})
        self._step, self._seconds = int(note["step"]), float(note["seconds"])
        for name, p in self._live.named_parameters():
            moments = {kind: tensors[f"{kind}.{name}"].to(p.device) for kind in ("exp_avg", "exp_avg_sq")}
            moments = {kind: torch.empty_like(p).copy_(value) for kind, value in moments.items()}
            self._adam.state[p] = {"step": torch.tensor(float(self._step)), **moments}
        self._cut_log(self._step)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for kind, net in (("live", self._live), ("ema", self._ema)):
            tensors |= {f"{kind}.{name}": value for name, value in net.state_dict().items()}
        for name, p in self._live.named_parameters():
            state = self._adam.state[p]
            tensors |= {f"{kind}.{name}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
        note = {"identity": self._identity, "step": self._step, "seconds": self._seconds}
        write_tensors(checkpoint_of(self._folder, self._plan.name), tensors, note)

    def forget(self) -> None:
        """Delete the checkpoint of a stage whose result is kept elsewhere."""
        checkpoint_of(self._folder, self._plan.name).unlink(missing_ok=True)

    def run(self, loss: Callable[[int], Tensor], held: Callable[[Any], dict[str, float]]) -> Any:
        """Take the steps that are left and return the averaged network, frozen.

        loss: of a step's batch by `module`; held: figures of the averaged network on images that are held out. Raises
        Stopped after a checkpoint, and SynthkdError for a loss that is not finite.
        """
        plan, told = self._plan, self._progress
        told.begin(plan.name, plan.steps, "steps")
        told.advance(plan.name, self._step)
        began, saved = time.monotonic() - self._seconds, time.monotonic()
        total, since, counted = torch.zeros((), device=self._device), time.monotonic(), 0
        while self._step < plan.steps:
            total += self._one(loss)
            counted += 1
            last = self._step == plan.steps
            if counted == _EVERY or last:
                row = self._row(total, counted, since)
                if last or self._step % max(_EVERY, plan.steps // _HELD_PARTS) < counted:
                    row |= held(self._ema)
                self._seconds = time.monotonic() - began
                self._log(row | {"seconds": round(self._seconds, 2)}, last)
                total, since, counted = torch.zeros_like(total), time.monotonic(), 0
            told.advance(plan.name, 1)
            if (stop := self._should_stop()) or time.monotonic() - saved > _SAVE_SECONDS:
                self._seconds = time.monotonic() - began
                self._save()
                saved = time.monotonic()
            if stop and not last:
                told.end(plan.name)
                raise Stopped
        told.end(plan.name)
        return self._ema

    def _one(self, loss: Callable[[int], Tensor]) -> Tensor:
        """One step; its loss, on the device."""
        rate = self._plan.rate(self._step)
        for group, factor in zip(self._adam.param_groups, self._factors, strict=False):
            group["lr"] = rate * factor
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

    def _row(self, total: Tensor, counted: int, since: float) -> dict[str, float]:
        mean = float(total) / counted
        if not math.isfinite(mean):
            plan, checkpoint = self._plan, checkpoint_of(self._folder, self._plan.name)
            raise SynthkdError(
                f"{plan.command}: the loss of the {plan.name} is not finite at step {self._step}; lower its learning "
                f"rate and delete {checkpoint}"
            )
        rate = counted * self._plan.batch_size / (time.monotonic() - since)
        return {"loss": round(mean, 5), "images_per_second": round(rate, 1)}

    def _log(self, row: dict[str, float], last: bool) -> None:
        line = json.dumps({"stage": self._plan.name, "step": self._step, **row})
        with (self._folder / LOG).open("a") as f:
            f.write(line + "\n")
        self._progress.note(self._plan.name, f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s")
        if last:
            self.figures = {"steps": self._plan.steps, "batch_size": self._plan.batch_size, **row}
            mean = self._plan.steps * self._plan.batch_size / max(self._seconds, 1e-9)
            self.figures["images_per_second"] = round(mean, 1)

    def _cut_log(self, step: int) -> None:
        """Drop this stage's rows of steps that are taken again, and a line that a kill left half."""
        path, kept = self._folder / LOG, []
        for line in path.read_text().splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if row["stage"] != self._plan.name or row["step"] <= step:
                    kept.append(line)
        if path.is_file():
            write_atomically(path, "".join(f"{line}\n" for line in kept))
