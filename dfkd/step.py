"""One training step: teacher, student, losses, backward, optimizer, in as few launches as torch allows, without a wait.

The graphs are: the teacher (none with stored labels), the student with its losses, their backward; the optimizer and
the running mean of the weights are one fused call each.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel

from synthkd.dfkd.distill_spec import DistillSpec, learning_rate
from synthkd.dfkd.feed import Batch
from synthkd.dfkd.objective import Objective, Taught
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.views import ViewSpec, looks
from synthkd.engine import rng
from synthkd.engine.errors import SynthkdError

# Grad-CAM takes gradients inside the graph; a process may train many students, each with graphs of its own.
_DYNAMO = {"trace_autograd_ops": True, "recompile_limit": 1024, "accumulated_recompile_limit": 4096}


class Step:
    """The student, its optimizer and running mean; `run` takes one batch."""

    def __init__(
        self, objective: Objective, spec: DistillSpec, ranks: Ranks, dtype: torch.dtype, mode: str | None
    ) -> None:
        """dtype: of the networks under autocast; mode: of torch.compile, None for eager.

        Raises SynthkdError for CUDA graphs over several parts of a batch.
        """
        self.objective, self.spec, self.ranks, self.dtype = objective, spec, ranks, dtype
        self.view, self.device = ViewSpec.of(spec), torch.device(ranks.device)
        self.net = objective.student.net
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, spec)
        self.mean = _floats(self.net, copy=True) if spec.ema else {}
        self._draws = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.net.modules())
        self._replayed = mode in ("reduce-overhead", "max-autotune") and self.device.type == "cuda"
        if self._replayed and spec.accumulate > 1:
            raise SynthkdError(f"--compile {mode}: CUDA graphs do not add gradients up; set accumulate to 1")
        self._teach: Any = graph(objective.teach, mode)
        self._loss: Any = graph(objective, mode)
        if ranks.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._loss = DistributedDataParallel(self._loss, device_ids=devices)

    def run(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step of the optimizer on a batch: loss, and logits [B,K] of student and teacher, without a wait.

        Dense networks' logits are [B,K,h,w]; raises SynthkdError for their hard loss without label maps.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, step)
        if self._draws:
            self._seed(step)
        self.optimizer.zero_grad(set_to_none=True)
        x = looks(batch.images, batch.views, self.view, batch.partners)
        x = x.contiguous(memory_format=torch.channels_last)
        labels, targets = self._labels(batch), self._targets(batch)
        parts = self.spec.accumulate
        with torch._dynamo.config.patch(_DYNAMO), self._compiling():
            found = [self._part(x, batch, labels, targets, part, parts) for part in range(parts)]
        self.optimizer.step()
        if self.mean:
            self._follow(step)
        if parts == 1:
            return found[0]
        losses, ours, theirs = zip(*found, strict=True)
        return torch.stack(losses).sum(), torch.cat(ours), torch.cat(theirs)

    def _part(
        self, x: Tensor, batch: Batch, labels: Tensor, targets: Tensor | None, part: int, parts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of one part of a batch: its share of the loss, and both networks' logits."""
        if self._replayed:  # CUDA graphs: results of the last replay may be overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        size = len(x) // parts
        cut = slice(part * size, (part + 1) * size) if parts > 1 else slice(None)
        with self._autocast():
            taught = self._teach(x[cut]) if batch.logits is None else Taught(batch.logits[cut].float())
        with self._quiet(part + 1 < parts), self._autocast():
            loss, said = self._loss(x[cut], taught, labels[cut], None if targets is None else targets[cut])
        with self._quiet(part + 1 < parts):
            (loss / parts).backward()
        found = loss.detach() / parts, said, taught.logits
        return (found[0].clone(), said.clone(), taught.logits.clone()) if self._replayed else found

    def _labels(self, batch: Batch) -> Tensor:
        """Labels [B], or label maps [B,h,w] of dense networks where a loss reads them."""
        if not (self.objective.dense and self.spec.hard):
            return batch.labels
        if batch.masks is None:
            hard = f"hard is {self.spec.hard}, but these images have no label maps"
            raise SynthkdError(f"distill: {hard}; set it to 0, the teacher's word is enough")
        return batch.masks

    def _targets(self, batch: Batch) -> Tensor | None:
        """Class shares [B,K] of blended images for the hard loss; None where labels do."""
        # By the spec, not by the batch: one graph for all batches.
        if self.objective.dense or not self.spec.hard or not self.spec.mix:
            return None
        share = torch.from_numpy(batch.views.share).to(self.device, non_blocking=True)[:, None]
        eye = torch.eye(self.objective.num_classes, device=self.device)
        return share * eye[batch.labels] + (1 - share) * eye[batch.partner_labels]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """A compiler that is missing or fails is one line."""
        try:
            yield
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise SynthkdError(f"distill: torch cannot compile the step here ({reason}); set --compile off") from error

    def _quiet(self, on: bool) -> AbstractContextManager[Any]:
        """Within it gradients are not exchanged: only the last part of a batch does that."""
        return self._loss.no_sync() if on and self.ranks.world > 1 else nullcontext()

    def _seed(self, step: int) -> None:
        """Dropout is a function of (seed, step, rank), so that there is no state of it to keep."""
        torch.manual_seed(int(rng.raw(self.spec.seed, step, f"dropout {self.ranks.rank}", 1)[0] >> 1))

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """mean <- d mean + (1 - d) weights, d = min(ema, (1 + step) / (10 + step)), so that the start is forgotten."""
        decay, now = min(self.spec.ema, (1 + step) / (10 + step)), _floats(self.net)
        torch._foreach_lerp_(list(self.mean.values()), [now[name] for name in self.mean], 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The student's tensors by name: the running mean where there is one."""
        return {**self.net.state_dict(), **self.mean}

    def state(self) -> dict[str, Tensor]:
        """All that a later step hangs on, by name."""
        out = {f"net.{name}": value for name, value in self.objective.state_dict().items()}
        out |= {f"mean.{name}": value for name, value in self.mean.items()}
        for i, p in enumerate(self.parameters):
            out |= {f"optimizer.{i}.{name}": torch.as_tensor(v) for name, v in self.optimizer.state[p].items()}
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; raises KeyError, ValueError or RuntimeError for another network's."""
        cut, kept = _tables(state), dict[str, dict[str, Tensor]]()
        for name, value in cut.get("optimizer", {}).items():
            index, _, what = name.partition(".")
            kept.setdefault(index, {})[what] = value
        self.objective.load_state_dict(cut["net"])
        for name, value in self.mean.items():
            value.copy_(cut["mean"][name])
        for i, p in enumerate(self.parameters):
            self.optimizer.state[p] = {k: like(v, p) for k, v in kept.get(str(i), {}).items()}


def graph(call: Callable[..., Any], mode: str | None) -> Any:
    """One graph, whole or an error; called with one size of batch, it is compiled once."""
    return call if mode is None else torch.compile(call, mode=mode, fullgraph=True, dynamic=False)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of an optimizer's tensor in its parameter's memory, since the fused step takes both as they lie.

    Counters stay scalars.
    """
    return value.to(parameter.device).clone() if value.dim() == 0 else torch.empty_like(parameter).copy_(value).detach()


def _tables(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Names cut at their first dot."""
    out: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        table, _, rest = name.partition(".")
        out.setdefault(table, {})[rest] = value
    return out


def _floats(net: nn.Module, copy: bool = False) -> dict[str, Tensor]:
    """Floating point tensors of a network by name; counters are none."""
    found = {name: value.detach() for name, value in net.state_dict().items() if value.is_floating_point()}
    return {name: value.clone() for name, value in found.items()} if copy else found


def _optimizer(parameters: list[nn.Parameter], spec: DistillSpec) -> torch.optim.Optimizer:
    """One fused call a step; decoupled weight decay (arXiv 1711.05101), or Nesterov's momentum."""
    if spec.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, spec.learning_rate, spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.momentum > 0,
            fused=True,
        )  # fmt: skip
    return torch.optim.AdamW(parameters, spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
