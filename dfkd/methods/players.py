"""MosaicKD's two players that are thrown away: the generator, the patch discriminator, and a step of each.

They learn between two steps of the student, on its device, without a wait; see `dfkd/methods/mosaickd.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.flop_counter import FlopCounterMode

from synthkd.dfkd.generators import PATCHES, Generator, PatchDiscriminator, patch_loss
from synthkd.dfkd.losses import class_balance, class_rows, divergence, entropy
from synthkd.dfkd.step import graph, like
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.train_options import TrainOptions
from synthkd.engine import rng
from synthkd.engine.errors import SynthkdError
from synthkd.engine.guidance import frozen
from synthkd.kernels import to_uint8

# What a log row says of the players, in nats but for the balance (bits); each is a mean since the last row.
TERMS = ("discriminator", "generator", "local", "teacher_entropy", "student_kl", "class_balance")
# A process may train many generators, each with graphs of its own.
_DYNAMO = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096}


@dataclass(frozen=True, kw_only=True)
class GameSpec:
    """What the players are and what they want (arXiv 2110.15094, sec. 3.2 and 4.1).

    patch: pixels that a logit of the discriminator sees, 10, 22 or 46; noise: the generator's input; widths: its
    channels; patch_width: the discriminator's. local, align, adv, balance: weights of the generator's terms; lr:
    Adam's, with cosine decay to zero; betas: Adam's. batch: images of a step, 0: the student's synthetic half.
    """

    patch: int = 10
    noise: int = 100
    widths: Sequence[int] = (256, 128, 64)
    patch_width: int = 128
    local: float = 1.0
    align: float = 1.0
    adv: float = 1.0
    balance: float = 10.0
    lr: float = 1e-3
    betas: Sequence[float] = (0.5, 0.999)
    batch: int = 0


class Players:
    """Generator and discriminator, how they learn from teacher and student, and all that a later step hangs on."""

    def __init__(
        self, spec: GameSpec, teacher: Teacher, student: Teacher, *, batch: int, rounds: int, seed: int,
        how: TrainOptions,
    ) -> None:  # fmt: skip
        """batch: images of a step; rounds: steps of each player in all; student: live, only ever looked through."""
        if min(teacher.input_size) < (least := 2 ** PATCHES[spec.patch]):
            size = "x".join(map(str, teacher.input_size))
            raise SynthkdError(f"method mosaickd: patch is {spec.patch}: images of {size} need {least} pixels each way")
        self.spec, self.batch, self.rounds, self.seed, self.dtype = spec, batch, rounds, seed, how.dtype
        self.teacher, self._live = teacher, student
        self.device = teacher.get_buffer("mean").device
        self._copy: Teacher = deepcopy(student).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
            torch.manual_seed(int(rng.raw(seed, 0, "players", 1)[0] >> 1))
            made = Generator(teacher.input_size, spec.noise, spec.widths)
            judge = PatchDiscriminator(spec.patch, spec.patch_width)
        self.generator, self.discriminator = (_placed(net, self.device) for net in (made, judge))
        self._copy.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._adam = {name: _adam(net, spec) for name, net in self._nets().items()}
        self._sums, self._count = torch.zeros(len(TERMS), device=self.device), 0
        mode = _uncaptured(how.compile_mode(self._operations(), rounds))
        self._make: Any = graph(self.generator, mode)
        self._told: Any = graph(self.discriminator_loss, mode)
        self._wanted: Any = graph(self.generator_loss, mode)

    def _nets(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def learn(self, real: Tensor, iteration: int) -> None:
        """A step of the discriminator, then one of the generator, on the same made images.

        real: uint8 [N,3,h,w] of the pool. The student is seen in eval mode through a copy, and neither it nor the
        teacher has a gradient afterwards, frozen or not.
        """
        self._refresh()
        z = self.noise("players", iteration, self.batch)
        rate = 0.5 * self.spec.lr * (1 + math.cos(math.pi * iteration / self.rounds))
        with self._running(), torch.enable_grad():
            images = self._make(z).float()
            loss = self._told(images.detach(), real.to(self.device).float() / 255)
            self._step("discriminator", loss, rate)
            with frozen([self.discriminator, self.teacher, self._copy]):
                wanted, parts = self._wanted(images)
                self._step("generator", wanted, rate)
        self._sums += torch.stack([loss.detach(), wanted.detach(), *parts])
        self._count += 1

    def discriminator_loss(self, made: Tensor, real: Tensor) -> Tensor:
        """(BCE(D(real), 1) + BCE(D(made), 0)) / 2, a mean over patches (arXiv 2110.15094, eq. 5)."""
        told = self.discriminator(made), self.discriminator(real)
        return (patch_loss(told[0], False) + patch_loss(told[1], True)) / 2

    def generator_loss(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """local BCE(D(x), 1) + align H(t(x)) - adv KL(t || s) + balance sum_k p_k log2 p_k, and the parts unweighted.

        images [B,3,H,W] in [0,1]. Of dense networks every position is a sample.
        """
        spec = self.spec
        t, s = class_rows(self.teacher(images)), class_rows(self._copy(images))
        local, unsure = patch_loss(self.discriminator(images), True), entropy(t).mean()
        apart, balance = divergence(s, t).mean(), class_balance(t)
        loss = spec.local * local + spec.align * unsure - spec.adv * apart + spec.balance * balance
        return loss, [x.detach() for x in (local, unsure, apart, balance)]

    def _step(self, name: str, loss: Tensor, rate: float) -> None:
        """One step of a player; only its own parameters are differentiated."""
        parameters, adam = list(self._nets()[name].parameters()), self._adam[name]
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        adam.param_groups[0]["lr"] = rate
        adam.step()
        adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _refresh(self) -> None:
        """The student as it is now."""
        here, there = self._copy.state_dict(), self._live.state_dict()
        torch._foreach_copy_(list(here.values()), [there[name] for name in here])

    @torch.no_grad()
    def images(self, z: Tensor, kept: bool = False) -> Tensor:
        """Noise [B,noise] -> uint8 [B,3,h,w], channels_last; B at least 2.

        kept: on disk; then what is not finite is a SynthkdError, which waits for the device.

        In train mode, as discriminator and teacher have judged such images: the generator's running statistics trail
        its weights.
        """
        with self._running():
            drawn = self._make(z).float()
        if kept and not bool(drawn.isfinite().all()):
            raise SynthkdError("method mosaickd: the generator's images are not finite; lower lr")
        return to_uint8(drawn)

    def noise(self, purpose: str, index: int, count: int) -> Tensor:
        """Standard normal [count,noise], a function of (seed, purpose, index)."""
        drawn = rng.normal(self.seed, index, f"noise of {purpose}", count * self.spec.noise)
        return torch.from_numpy(drawn).view(count, -1).to(self.device, non_blocking=True)

    def terms(self) -> dict[str, float]:
        """Means since it was last asked; raises SynthkdError where one is not finite."""
        if not self._count:
            return {}
        found = dict(zip(TERMS, (self._sums / self._count).tolist(), strict=True))
        self._sums, self._count = torch.zeros_like(self._sums), 0
        for name, value in found.items():
            if not math.isfinite(value):
                raise SynthkdError(f"method mosaickd: {name} is {value}; lower lr, or set --precision float32")
        return found

    def state(self) -> dict[str, Tensor]:
        """All that a later step hangs on, by name."""
        out = {"sums": self._sums.clone(), "count": torch.tensor(self._count)}
        for name, net in self._nets().items():
            out |= {f"{name}.net.{key}": value.detach().clone() for key, value in net.state_dict().items()}
            for i, p in enumerate(net.parameters()):
                kept = self._adam[name].state[p]
                out |= {f"{name}.adam.{i}.{key}": torch.as_tensor(value).clone() for key, value in kept.items()}
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; raises KeyError or RuntimeError for another game's."""
        self._sums, self._count = state["sums"].to(self.device), int(state["count"])
        for name, net in self._nets().items():
            net.load_state_dict(_under(state, f"{name}.net."))
            for i, p in enumerate(net.parameters()):
                kept = _under(state, f"{name}.adam.{i}.")
                self._adam[name].state[p] = {key: like(value, p) for key, value in kept.items()}

    def _operations(self) -> float:
        """Floating point operations of all steps, roughly: a backward pass counts as two forward."""
        nets = [*self._nets().values(), self.teacher, self._copy]
        x = torch.zeros(1, 3, *self.teacher.input_size, device=self.device)
        with FlopCounterMode(display=False) as count, torch.no_grad():
            for net in nets:
                net.eval()(torch.zeros(1, self.spec.noise, device=self.device) if net is self.generator else x)
        for net in nets:
            net.train()  # a Teacher stays in eval mode
        return 3.0 * count.get_total_flops() * self.batch * self.rounds

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Precision of the networks, and one line where a compiler is missing or fails."""
        half, device = self.dtype != torch.float32, self.device.type
        # No cache of cast weights: the discriminator's change between its own loss and the generator's.
        cast = torch.autocast(device, self.dtype, enabled=half, cache_enabled=False)
        try:
            with torch._dynamo.config.patch(_DYNAMO), cast:
                yield
        except TorchDynamoException as error:
            why = " ".join(str(error).split())[:200]
            raise SynthkdError(f"method mosaickd: torch cannot compile its step ({why}); set --compile off") from error


def _placed(net: nn.Module, device: torch.device) -> nn.Module:
    made: nn.Module = net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    return made


def _adam(net: nn.Module, spec: GameSpec) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), spec.lr, betas=(spec.betas[0], spec.betas[1]), fused=True)


def _uncaptured(mode: str | None) -> str | None:
    """A mode without CUDA graphs: made images are read by the discriminator's and the generator's graph alike."""
    return {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}.get(mode or "", mode)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
