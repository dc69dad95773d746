"""Owns a prior, a recipe and a guidance; draws groups: run a plan's unit, get a Batch."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from synthkd.engine import rng
from synthkd.engine.backends import Execution, Routes
from synthkd.engine.batch import Batch, Preview
from synthkd.engine.checkpointing import checkpointed
from synthkd.engine.clock import StageClock
from synthkd.engine.compiled import CompileChoice, CompiledCall
from synthkd.engine.config import Recipe, Request, fingerprint
from synthkd.engine.decoders import Decoder
from synthkd.engine.environment import environment, versions
from synthkd.engine.errors import NonFiniteError, SynthkdError
from synthkd.engine.fusion import FuseChoice, Fuser
from synthkd.engine.guidance import GroupGuidance, Guidance, frozen, parts_of
from synthkd.engine.halving import fitting, smaller_plan
from synthkd.engine.image_to_image import Start, encoded, first_call, noised
from synthkd.engine.latent_model import Conditioning, LatentModel, Prompted
from synthkd.engine.looked import looked_through
from synthkd.engine.memory import MemoryPlan, checked_part
from synthkd.engine.models import load_model, weights_digest, wrap_pipeline
from synthkd.engine.passes import plan_group
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.roles import Parts
from synthkd.engine.sampler import Chunks, Steering, sample
from synthkd.engine.schedule import schedule_identity
from synthkd.engine.steering import check_prompts, noise, steering, tables_of
from synthkd.engine.stream import Stream
from synthkd.kernels import to_uint8

_log = logging.getLogger("synthkd")


class Synthesizer:
    """Draws images of a recipe from a latent-diffusion prior under a guidance.

    >>> synth = Synthesizer.from_pretrained("embedded:digits", recipe, guidance=loss)
    >>> for batch in synth.stream(Request(num_samples=1000)):
    ...     batch.images  # uint8 [B,3,H,W]
    """

    def __init__(
        self,
        model: LatentModel,
        recipe: Recipe,
        guidance: Guidance | None = None,
        decoder: Decoder | None = None,
        fuse: FuseChoice = "auto",
        compile: CompileChoice = "auto",
        look: str | None = None,
        micro_batch: int | Literal["auto"] = "auto",
        execution: Execution | None = None,
    ) -> None:
        """model: the prior; guidance: needed where recipe.guidance.scale > 0; decoder: what guidance looks through.

        look: what it looks through in fact, in the recipe's vocabulary, where a set's calibration decided so; this is
        no part of the identity, which knows what was declared.
        micro_batch: samples at a time through every network, exactly as the group at once; `auto` plans that for the
        free memory (see `engine.memory`).
        compile: how a denoiser call becomes one graph (see `engine.compiled`): `auto`: on a GPU, for large images.
        execution: what each network runs on, on top of the recipe's `backends`; calls are not compiled then.
        fuse: which networks run this project's ops in place of their own while a group is drawn (see `engine.fusion`):
        `decoder`: those that decode; `all`: the denoiser too; `off`; `auto`: `decoder` where ops run Triton kernels.
        The guidance's networks are moved to the prior's device. One thread at a time may draw from a pipeline.
        Raises SynthkdError where recipe, prior and guidance do not fit together, and for another value of fuse.
        """
        if recipe.guidance.scale > 0 and guidance is None:
            raise SynthkdError("recipe: guidance.scale is above 0, but no guidance was given; pass one or set it to 0")
        self.model, self.recipe, self.guidance = model, recipe, guidance
        for network in guidance.modules() if guidance else ():
            network.to(model.device)
        self._declared = decoder or looked_through(model, recipe)
        self._look = looked_through(model, recipe, look) if look else self._declared
        named = look or ("vae" if recipe.guidance.decoder == "auto" else recipe.guidance.decoder)
        self._look_kind = "given" if decoder is not None and look is None else named.partition(":")[0]
        self._guide_through: Callable[[Tensor], Tensor] = self._look
        self._routes = Routes(recipe.backends, execution or Execution())
        self._compiled, self._micro_batch = self._compiler(compile), checked_part(micro_batch)
        self._memory: MemoryPlan | None = None
        self.processes: int | None = None  # that draw at once here and share the memory; None: as many as by default
        if micro_batch != "auto" and guidance is not None and not isinstance(guidance, GroupGuidance):
            raise SynthkdError("micro_batch: this guidance sees whole groups only: it has no look and judge")
        self._fuser = Fuser(fuse, (model.decoder.module, self._look.module), model.modules())
        self._shape = model.latent_shape(recipe.height, recipe.width)
        check_prompts(model, recipe)
        self._tables = tables_of(model, recipe)
        self._digest: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        recipe: Recipe,
        *,
        guidance: Guidance | None = None,
        device: str | None = None,
        loras: Sequence[str] = (),
        decoder: Decoder | None = None,
        fuse: FuseChoice = "auto",
        compile: CompileChoice = "auto",
        look: str | None = None,
        micro_batch: int | Literal["auto"] = "auto",
        execution: Execution | None = None,
    ) -> "Synthesizer":
        """Load a diffusers folder, a hub id or `embedded:digits`; device: `cuda` where there is one, else `cpu`.

        loras: `PATH[@WEIGHT]` each, fused into the weights (see `engine.models.load_model`); the rest: see `__init__`.
        """
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        prior = load_model(model, device=where, dtype=getattr(torch, recipe.dtype), loras=loras)
        return cls(prior, recipe, guidance, decoder, fuse, compile, look, micro_batch, execution)

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        recipe: Recipe,
        *,
        guidance: Guidance | None = None,
        decoder: Decoder | None = None,
        fuse: FuseChoice = "auto",
        compile: CompileChoice = "auto",
        micro_batch: int | Literal["auto"] = "auto",
        execution: Execution | None = None,
    ) -> "Synthesizer":
        """Use a live diffusers pipeline where it is, in its own dtype; it is left as it was after every group."""
        return cls(wrap_pipeline(pipe), recipe, guidance, decoder, fuse, compile, None, micro_batch, execution)

    def _compiler(self, choice: CompileChoice) -> CompiledCall:
        if self._routes.live and choice not in ("auto", "off"):
            raise SynthkdError(
                f"compile {choice!r} makes a whole call one graph, and roles have backends of their own "
                f"({self._routes.key}); use one of the two (--backend compile compiles role by role)"
            )
        choice = "off" if self._routes.live else choice
        return CompiledCall(choice, self.model.device, max(self.recipe.height, self.recipe.width))

    @property
    def look(self) -> Decoder:
        """What guidance looks through."""
        return self._look

    @property
    def how(self) -> dict[str, Any]:
        """What an environment says of the way networks run: parts of a group, what is fused, how calls are compiled."""
        how = {"micro_batch": self.memory.key, "fused": self.fused, "compiled": self.compiled}
        return how | {"roles": self._routes.key}

    @property
    def routes(self) -> Routes:
        """The roles with a backend of their own, and what was built for them."""
        return self._routes

    @property
    def compiled(self) -> str:
        """Mode in which denoiser calls are compiled, for the environment key; "" where they are not."""
        return "" if self._compiled.choice == "off" else self._compiled.choice

    @property
    def graphs(self) -> int:
        """How many graphs have been compiled so far: one per kind of denoiser call."""
        return self._compiled.graphs

    @property
    def fused(self) -> str:
        """Which networks are fused while a group is drawn, for the environment key; "" where none is."""
        return self._fuser.applies(self.model.device)

    def stream(self, request: Request) -> Stream:
        """An iterable of Batch over the request; lazy, nothing is drawn before it is iterated."""
        return Stream(self, Plan(self.recipe, request))

    def identity(self, seed: int) -> dict[str, Any]:
        """What decides the images: recipe, seed, guidance, weights; and the fingerprint over what was declared."""
        described = json.loads(json.dumps(self.guidance.describe())) if self.guidance else {}
        if self._digest is None:
            self._digest = self._model_digest()
        return {
            "fingerprint": fingerprint(self.recipe, seed, described),
            "recipe": self.recipe.to_dict(),
            "seed": seed,
            "guidance": described,
            "model_sha256": self._digest,
            "look": self._look_kind,
            "solver": {"eps": "from the shifted x0" if self.recipe.guidance.rederive_eps else "from the denoiser's x0"},
            "versions": versions(),
        }

    def _model_digest(self) -> str:
        """Over weights, configs and noise schedule, and those of the decoder that was declared for guidance."""
        own = self._declared is self.model.decoder
        look, settings = () if own else (self._declared.module,), {} if own else self._declared.settings
        parts = weights_digest([*self.model.modules(), *look]) + schedule_identity(self.model.scheduler_config)
        parts += json.dumps([self.model.settings(), settings], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()

    def run(self, unit: WorkUnit, seed: int, start: Start | None = None) -> Batch:
        """Draw one group; a non-finite one is redrawn with attempt + 1, one that does not fit the memory in parts.

        start: the images that it begins with instead of noise, one for each id of the unit.
        Raises NonFiniteError after `recipe.attempts` attempts, SynthkdError where memory does not suffice or the
        guidance is not the one of the unit's round.
        """
        stands_at = getattr(self.guidance, "round", 0)
        if self.recipe.guidance.scale > 0 and stands_at != unit.round:
            raise SynthkdError(
                f"group {unit.group} belongs to round {unit.round}, the guidance stands at round {stands_at}; "
                "synthkd.dfkd.draw_set draws a set round by round"
            )
        for attempt in range(self.recipe.attempts):
            again = partial(self._draw, unit, seed, attempt, start)
            batch = fitting(again, partial(self._shrink, unit.group), self.recipe, self.model.device)
            if batch is not None:
                return batch.first(unit.kept)
        raise NonFiniteError(
            f"group {unit.group} was not finite in {self.recipe.attempts} attempts; nothing of it was written. "
            "Lower guidance.scale, or use float32 or bfloat16"
        )

    def _shrink(self, group: int) -> bool:
        """Halve the parts that groups are drawn in, from `group` on; False where nothing is left to halve."""
        splits = self.guidance is None or isinstance(self.guidance, GroupGuidance)
        smaller = smaller_plan(self.memory, group, splits, self._routes.strict_bits)
        if smaller is not None:
            self.memory = smaller
            self._routes.forget()
        return smaller is not None

    def initial_latents(self, ids: Iterable[int], seed: int, attempt: int = 0) -> Tensor:
        """Initial noise [B,C,h,w] of samples, float32 standard normal on the host, moved to device and dtype."""
        return noise(self._shape, ids, seed, "latents", attempt).to(device=self.model.device, dtype=self.model.dtype)

    def prompts(self, unit: WorkUnit, seed: int) -> tuple[str, ...]:
        """The prompt of each member of a group: template and word for its class, drawn per sample."""
        templates = self.recipe.prompts
        picks = [rng.integer(seed, i, "prompt", len(templates)) for i in unit.ids]
        called = [(i, self.recipe.words(c)) for i, c in zip(unit.ids, unit.classes, strict=True)]
        words = [known[rng.integer(seed, i, "word", len(known)) if known[1:] else 0] for i, known in called]
        return tuple(templates[pick].replace("{class}", word) for pick, word in zip(picks, words, strict=True))

    def _draw(self, unit: WorkUnit, seed: int, attempt: int, start: Start | None = None) -> Batch | None:
        """One attempt at a group; None where a latent, a term or an image is not finite."""
        clock, first = StageClock(self.model.device), first_call(start, self.recipe, len(unit.ids))
        with ExitStack() as stack:
            if self._routes.key and not self._routes.ready:
                with clock("compile"):
                    self.prepare()
            self._settle(stack)
            if self._routes.key:
                stack.enter_context(self._routes.on(self._parts()))
            with clock("encode"):
                denoise: Any = Prompted(self.model, *self._conditions(self.prompts(unit, seed)))
            steer = self._steering(unit, seed, attempt, first)
            parted = any(self._chunks) or self.memory.checkpoint
            if parted:
                denoise = self._compiled.in_parts(denoise)
            cfg = self.recipe.guidance_scale, self.recipe.guidance_rescale
            z, advance = self.initial_latents(unit.ids, seed, attempt), None if parted else self._compiled.advance
            if start is not None and first:
                with clock("encode"):
                    clean = encoded(self.model, start.images, self.memory.decode)
                z = noised(clean, z, self._tables, first)
            drawn = sample(z, denoise, self._tables, cfg, steer, clock, advance)
            images = [self._decoded(z, clock) for z in (drawn.latents, *drawn.previews)]
            pixels = [to_uint8(x) for x in images]
            notes = [self._annotate(x, clock) for x in pixels]
        finite = torch.isfinite(drawn.latents).all()
        for tensor in (*drawn.previews, *images, *(t for terms in (*notes, *drawn.log) for t in terms.values())):
            finite = finite & torch.isfinite(tensor).all()
        if not bool(finite):  # the one wait for the device in a group
            return None
        targets = [steer.targets[-1], *(steer.targets[call + 1] for call in steer.keep)]
        return self._batch(unit, seed, attempt, list(zip(pixels, targets, notes, strict=True)), drawn.log, clock)

    def _decoded(self, z: Tensor, clock: StageClock) -> Tensor:
        with torch.no_grad(), clock("decode"):
            decode = self._routes.function("vae", self.model.decoder)
            parts = [decode(z[part]) for part in parts_of(len(z), self.memory.decode)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _settle(self, stack: ExitStack, fuse: bool = True) -> None:
        """Networks fused, frozen and tapped until the stack ends."""
        if fuse:
            stack.enter_context(self._fuser.on(self.model.device))
        guiding = self.guidance.modules() if self.guidance else ()
        stack.enter_context(frozen([*self.model.modules(), self._look.module, *guiding]))
        if isinstance(self.guidance, GroupGuidance):
            stack.enter_context(self.guidance.attached())

    def _annotate(self, pixels: Tensor, clock: StageClock) -> dict[str, Tensor]:
        if self.guidance is None:
            return {}
        with torch.no_grad(), clock("annotate"):
            noted: dict[str, Tensor] = self._routes.function("teacher", self.guidance.annotate)(pixels.float() / 255)
            return noted

    def _batch(
        self,
        unit: WorkUnit,
        seed: int,
        attempt: int,
        shown: list[tuple[Tensor, Tensor, dict[str, Tensor]]],
        log: list[Any],
        clock: StageClock,
    ) -> Batch:
        """shown: pixels, targets and notes of the finished images, then of each preview."""
        pixels, targets, notes = shown[0]
        return Batch(
            group=unit.group,
            round=unit.round,
            attempt=attempt,
            ids=tuple(unit.ids),
            prompts=self.prompts(unit, seed),
            images=pixels,
            labels=targets.argmax(dim=1),
            targets=targets,
            notes=notes,
            curves={name: [terms[name].float().cpu().tolist() for terms in log] for name in (log[0] if log else {})},
            seconds=clock.totals(),
            previews=tuple(Preview(p, *x) for p, x in zip(self.recipe.previews, shown[1:], strict=True)),
            environment=environment(self.model.device, **self.how),
        )

    def _conditions(self, prompts: tuple[str, ...]) -> tuple[Conditioning, Conditioning | None]:
        recipe = self.recipe
        size = (recipe.height, recipe.width)
        cond, uncond = self.model.conditions(prompts, recipe.negative_prompt, recipe.guidance_scale, size)
        interval = (recipe.cfg_start, recipe.cfg_stop)
        if uncond is None and recipe.guidance_scale > 1 and interval != (0.0, 1.0):
            raise SynthkdError(
                f"recipe: cfg_start, cfg_stop is {interval}; this model has its guidance scale embedded: "
                "leave them out"
            )
        return cond, uncond

    def _steering(self, unit: WorkUnit, seed: int, attempt: int, first: int = 0) -> Steering:
        """All that the group's calls need, made before the loop starts."""
        steer = steering(self.recipe, unit, seed, attempt, self._tables, self._shape, self.model.dtype, first)
        memory = self.guidance.begin() if isinstance(self.guidance, GroupGuidance) else None
        return replace(
            steer, loss=self.guidance, decode=self._guide_through, memory=memory, chunks=self._chunks,
            gradient=self._routes.gradient(self.guidance),
        )  # fmt: skip

    def prepare(self, say: Callable[[str], None] | None = None) -> Routes:
        """Build or load the backends of the roles now, not with the first group; say: told each stage of a build."""
        with ExitStack() as stack:
            self._settle(stack, fuse=False)  # the modules themselves: other runtimes fuse in ways of their own
            stack.enter_context(self._routes.on(self._parts(), say))
        return self._routes

    def _parts(self) -> Parts:
        return Parts(self.model, self.recipe, self._tables, self.guidance, self._look, self.memory)

    @property
    def _chunks(self) -> Chunks:
        """Samples at a time through denoiser and guidance, 0 where it is the whole group."""
        plan, group = self.memory, self.recipe.group_size
        return Chunks(*(part if part < group else 0 for part in (plan.denoise, plan.guide)))

    @property
    def memory(self) -> MemoryPlan:
        """How much of a group is computed at once, planned when it is first needed."""
        if self._memory is None:
            self._memory = self._planned()
            if self._memory.reason.startswith("not measured"):
                _log.warning(self._memory.describe())
            elif not self._memory.whole:
                _log.info(self._memory.describe())
            if self._memory.checkpoint:
                self._guide_through = checkpointed(self._look)
        return self._memory

    @memory.setter
    def memory(self, plan: MemoryPlan) -> None:
        self._memory = plan
        self._guide_through = checkpointed(self._look) if plan.checkpoint else self._look

    def _planned(self) -> MemoryPlan:
        group = self.recipe.group_size
        if self._micro_batch != "auto":
            part = min(self._micro_batch, group)
            return MemoryPlan(group, part, part, part, False, 0, 0, "as asked")
        first = self.recipe.prompts[0].replace("{class}", self.recipe.word(self.recipe.drawn_classes[0]))
        told = Prompted(self.model, *self._conditions((first,)))
        with ExitStack() as stack:
            self._settle(stack)
            return plan_group(self.model, self.recipe, self._tables, self._look, self.guidance, told, self.processes)

