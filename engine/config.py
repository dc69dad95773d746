"""What to draw: Recipe and Request, frozen, checked on birth, hashed into a fingerprint."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, get_args, get_type_hints

from synthkd.engine.errors import SynthkdError, suggest

DTYPES = ("float32", "float16", "bfloat16", "float64")
SCHEDULES = ("sigma", "constant", "cosine", "polyak")
GRADIENTS = ("x0", "unet")
SAMPLERS = ("ddim", "dpmpp_2m", "euler", "euler_ancestral", "lcm")
SPACINGS = ("model", "leading", "trailing", "linspace", "karras")
PREDICTIONS = ("model", "epsilon", "v_prediction", "sample")
FORMATS = ("png", "jpg", "webp")
EXECUTION = ("backends",)  # fields of a recipe that say how to compute, not what
AUTO_PIXELS = 64  # a side; up to here a full VAE costs little beside a run of its own to fit another


def _check(ok: bool, where: str, found: object, expected: str) -> None:
    if not ok:
        raise SynthkdError(f"recipe: {where} is {_shown(found)}; expected {expected}")


def _shown(value: object) -> str:
    """A value for a message, however long it is."""
    text = repr(value)
    return text if len(text) <= 300 else text[:299] + "…"


def _one_of(where: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise SynthkdError(f"recipe: {where} is {_shown(found)}; {suggest(str(found), known)}")


def _check_decoder(decoder: str) -> None:
    kind, _, rest = decoder.partition(":")
    pooled = kind == "pooled" and rest.isdecimal() and 2 <= int(rest) <= 8
    ok = decoder in ("auto", "vae") or pooled or (kind in ("tiny", "fitted") and bool(rest))
    known = "'auto', 'vae', 'pooled:N' with N from 2 to 8, 'tiny:PATH' or 'fitted:PATH'"
    _check(ok, "guidance.decoder", decoder, known)


def within(start: float, stop: float, step: int, steps: int) -> bool:
    """Whether denoiser call `step` of `steps` lies in a share of the run."""
    return round(start * steps) <= step < round(stop * steps)


def _floats(spec: Any) -> None:
    """Whole numbers in float fields become floats: 3 and 3.0 are one recipe with one fingerprint."""
    for f in fields(spec):
        if f.type is float and type(getattr(spec, f.name)) is int:
            object.__setattr__(spec, f.name, float(getattr(spec, f.name)))


@dataclass(frozen=True, kw_only=True)
class GuidanceSpec:
    """When and how strongly the guidance loss moves the predicted clean latent.

    scale: root-mean-square size of one update of x0, in latent units; 0 turns guidance off.
    schedule: of the step: `sigma` multiplies scale by sigma_t = sqrt(1 - alphas_cumprod), `constant` by 1, `cosine`
    by half a cosine from 1 to 0 over the run; `polyak` lets loss and gradient decide, with scale sigma_t at most
    (and no step where the loss is below 0, as an adversarial term can make it).
    start, stop: guided share of the steps, as fractions of the run; every: guide each n-th step of it.
    gradient: `x0` differentiates the decoder and the loss only; `unet` goes through the denoiser to z_t.
    decoder: what the loss looks through: `vae`, the prior's own; `pooled:N`, the same on the latent averaged over N x N
    cells; `tiny:PATH`, an AutoencoderTiny folder; `fitted:PATH`, what `synthkd fit-decoder` wrote; `auto`: `vae` for
    images of at most AUTO_PIXELS a side, above that one that a set fits for itself before it is drawn.
    min_cosine: a calibration group's mean cosine between the gradient through a cheaper decoder and that through the
    VAE, below which a set is drawn with the VAE instead; 0 trusts any decoder.
    rederive_eps: the solver's eps from the shifted x0 (True) or from the denoiser's own x0 (False, MPGD).
    looks: views over which the loss is a mean, the plain image and looks - 1 random ones (arXiv 2403.12404), each
    shifted by up to look_shift of its size and, with look_flip, mirrored half of the time.
    """

    scale: float = 0.1
    schedule: str = "sigma"
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    gradient: str = "x0"
    decoder: str = "auto"
    min_cosine: float = 0.3
    rederive_eps: bool = False
    looks: int = 1
    look_shift: float = 0.1
    look_flip: bool = False

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value outside its range."""
        _floats(self)
        _check(math.isfinite(self.scale) and self.scale >= 0, "guidance.scale", self.scale, "a number >= 0")
        _one_of("guidance.schedule", self.schedule, SCHEDULES)
        _one_of("guidance.gradient", self.gradient, GRADIENTS)
        interval = 0.0 <= self.start < self.stop <= 1.0
        _check(interval, "guidance.start, stop", (self.start, self.stop), "0 <= start < stop <= 1")
        _check(self.every >= 1, "guidance.every", self.every, "a whole number >= 1")
        _check_decoder(self.decoder)
        _check(0 <= self.min_cosine < 1, "guidance.min_cosine", self.min_cosine, "0 <= cosine < 1 (0: no calibration)")
        _check(1 <= self.looks <= 64, "guidance.looks", self.looks, "1 to 64 (1: the plain image alone)")
        _check(0 <= self.look_shift < 1, "guidance.look_shift", self.look_shift, "0 <= share < 1")

    def active(self, step: int, steps: int) -> bool:
        """Whether denoiser call `step` of `steps` is guided."""
        first, inside = round(self.start * steps), within(self.start, self.stop, step, steps)
        return self.scale > 0 and inside and (step - first) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class CutMixSpec:
    """Latent CutMix (arXiv 2504.00870): boxes exchanged between the latents of a group.

    every: after each n-th denoiser call, 0 for never; last_clean: denoiser calls at the end that stay free of
    it and repair the seams; alpha: Beta(alpha, alpha) of the kept area; scope: partners of the same `class`,
    or `any` sample of the group (the label then follows the area).
    """

    every: int = 0
    last_clean: int = 5
    alpha: float = 1.0
    scope: str = "class"

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value outside its range."""
        _floats(self)
        _check(self.every >= 0, "cutmix.every", self.every, "a whole number >= 0 (0: never)")
        _check(self.last_clean >= 1, "cutmix.last_clean", self.last_clean, "a whole number >= 1")
        _check(math.isfinite(self.alpha) and self.alpha > 0, "cutmix.alpha", self.alpha, "a number > 0")
        _one_of("cutmix.scope", self.scope, ("class", "any"))

    def active(self, step: int, steps: int) -> bool:
        """Whether boxes are exchanged after denoiser call `step` of `steps`."""
        return self.every > 0 and (step + 1) % self.every == 0 and step < steps - self.last_clean


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what an image looks like, but for the seed; frozen and checked on birth.

    classes: class names in the order of the teacher's outputs; class_words: what prompts call them, where that
    differs, `a|b|c` for one of several, drawn per sample; class_weights: images of each class in proportion, 0 leaves a
    class out (all alike where empty);
    prompts: templates with `{class}`, one drawn per sample.
    sampler, steps: the solver and its denoiser calls; eta: DDIM's fresh noise; spacing: which timesteps are called,
    the prior's own by default; prediction_type: what the prior must predict (checked; `model`: whatever it does);
    guidance_scale: classifier-free guidance as in diffusers (off at 1 and below), guidance_rescale as well.
    cfg_start, cfg_stop: the share of the run that has it (arXiv 2404.07724); elsewhere the unconditional half is not
    computed.
    guidance: the teacher's part. A group is classes_per_group x samples_per_class samples that share batch
    statistics, Latent CutMix partners and randomness.
    previews: shares of the run at which the clean latent is decoded into an extra, marked sample.
    rounds: parts of the set between which the guidance may learn (a student, say): the first ones have
    groups_per_round groups each (0: one shard's), the last one all the rest.
    backends: `role=name` entries, what each network runs on (see `engine.roles`); execution only, in no fingerprint.
    """

    classes: tuple[str, ...]
    class_words: tuple[str, ...] = ()
    class_weights: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ("a photo of a {class}",)
    negative_prompt: str = ""
    height: int = 512
    width: int = 512
    sampler: str = "ddim"
    steps: int = 20
    eta: float = 0.0
    spacing: str = "model"
    prediction_type: str = "model"
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    cfg_start: float = 0.0
    cfg_stop: float = 1.0
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)
    cutmix: CutMixSpec = field(default_factory=CutMixSpec)
    classes_per_group: int = 10
    samples_per_class: int = 2
    groups_per_shard: int = 50
    previews: tuple[float, ...] = ()
    rounds: int = 1
    groups_per_round: int = 0
    dtype: str = "float32"
    image_format: str = "png"
    image_quality: int = 95
    attempts: int = 3
    backends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise SynthkdError for a field outside its range."""
        _floats(self)
        self._check_text()
        self._check_classes()
        self._check_sampler()
        self._check_rounds()
        for name in ("height", "width", "steps", "classes_per_group", "samples_per_class", "groups_per_shard"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("image_format", self.image_format, FORMATS)
        _check(1 <= self.image_quality <= 100, "image_quality", self.image_quality, "1 to 100")
        _check(self.attempts >= 1, "attempts", self.attempts, "a whole number >= 1")
        _check(math.isfinite(self.guidance_scale), "guidance_scale", self.guidance_scale, "a finite number")
        size = (self.classes_per_group, len(self.drawn_classes))
        _check(size[0] <= size[1], "classes_per_group", size[0], f"at most the {size[1]} classes that are drawn")
        guided = self.guidance.scale == 0 or any(self.guidance.active(i, self.steps) for i in range(self.steps))
        window = (self.guidance.start, self.guidance.stop)
        _check(guided, "guidance.start, stop", window, f"a window that holds at least one of {self.steps} steps")
        self._check_cutmix()
        self._check_previews()

    def _check_text(self) -> None:
        _check(len(self.classes) >= 1, "classes", self.classes, "at least one class name")
        _check(len(set(self.classes)) == len(self.classes), "classes", self.classes, "distinct names")
        _check(len(self.prompts) >= 1, "prompts", self.prompts, "at least one template")
        for prompt in self.prompts:
            _check("{class}" in prompt, "prompts", prompt, "a template that contains {class}")

    def _check_classes(self) -> None:
        count = len(self.classes)
        if self.class_words:
            _check(len(self.class_words) == count, "class_words", len(self.class_words), f"{count}, one per class")
            whole = all(part.strip() for word in self.class_words for part in word.split("|"))
            _check(whole, "class_words", self.class_words, "no empty words (a|b is one of two, drawn per sample)")
        if self.class_weights:
            _check(len(self.class_weights) == count, "class_weights", len(self.class_weights), f"{count} numbers")
            whole = all(0 <= w <= 1000 for w in self.class_weights) and any(self.class_weights)
            _check(whole, "class_weights", self.class_weights, "whole numbers 0 to 1000, not all of them 0")

    def _check_sampler(self) -> None:
        _one_of("sampler", self.sampler, SAMPLERS)
        _one_of("spacing", self.spacing, SPACINGS)
        _one_of("prediction_type", self.prediction_type, PREDICTIONS)
        _check(self.steps <= 10_000, "steps", self.steps, "at most 10,000")
        _check(0 <= self.eta <= 1, "eta", self.eta, "0 to 1")
        _check(self.eta == 0 or self.sampler == "ddim", "eta", self.eta, f"0 with sampler {self.sampler!r}")
        _check(0 <= self.guidance_rescale <= 1, "guidance_rescale", self.guidance_rescale, "0 to 1")
        interval = 0.0 <= self.cfg_start <= self.cfg_stop <= 1.0
        _check(interval, "cfg_start, cfg_stop", (self.cfg_start, self.cfg_stop), "0 <= cfg_start <= cfg_stop <= 1")
        fits = self.sampler != "dpmpp_2m" or self.steps >= 2
        _check(fits, "steps", self.steps, "at least 2 with sampler 'dpmpp_2m', which is of second order")
        levels = self.sampler in ("euler", "euler_ancestral", "dpmpp_2m")
        _check(levels or self.spacing != "karras", "spacing", self.spacing, f"another one with {self.sampler!r}")
        own = self.sampler != "lcm" or self.spacing == "model"
        _check(own, "spacing", self.spacing, "'model' with sampler 'lcm', which has timesteps of its own")

    def _check_rounds(self) -> None:
        _check(self.rounds >= 1, "rounds", self.rounds, "a whole number >= 1")
        once = self.rounds > 1 or self.groups_per_round == 0
        _check(once, "groups_per_round", self.groups_per_round, "0 with rounds = 1")
        fits = self.groups_per_round >= 0 and self.groups_per_round % max(self.groups_per_shard, 1) == 0
        _check(
            fits, "groups_per_round", self.groups_per_round, f"a multiple of groups_per_shard {self.groups_per_shard}"
        )

    def _check_cutmix(self) -> None:
        if self.cutmix.every == 0:
            return
        partners = self.samples_per_class if self.cutmix.scope == "class" else self.group_size
        name = "samples_per_class" if self.cutmix.scope == "class" else "group size"
        _check(partners >= 2, name, partners, "at least 2 with Latent CutMix on (a lone sample has no partner)")
        fires = any(self.cutmix.active(i, self.steps) for i in range(self.steps))
        span = f"values that leave an exchange within {self.steps} steps (every: 0 switches it off)"
        _check(fires, "cutmix.every, last_clean", (self.cutmix.every, self.cutmix.last_clean), span)

    def _check_previews(self) -> None:
        shares = self.previews
        _check(all(0 < p < 1 for p in shares), "previews", shares, "shares of the run above 0 and below 1")
        calls = [self.preview_call(p) for p in shares]
        early = all(call < self.steps - 1 for call in calls)
        _check(early, "previews", shares, f"shares before the last of {self.steps} calls")
        names = [round(100 * p) for p in shares]
        rising = all(a < b for a, b in pairwise(calls)) and all(a < b for a, b in pairwise(names))
        _check(rising, "previews", shares, f"rising shares that name different calls of {self.steps}, a percent apart")

    def preview_call(self, share: float) -> int:
        """The denoiser call whose clean latent a preview at this share of the run shows."""
        return max(round(share * self.steps) - 1, 0)

    def cfg_active(self, step: int) -> bool:
        """Whether denoiser call `step` has classifier-free guidance."""
        return self.guidance_scale > 1 and within(self.cfg_start, self.cfg_stop, step, self.steps)

    def resolved_decoder(self) -> str:
        """`guidance.decoder`, with `auto` as what it stands for at this size: `vae`, or `fitted`."""
        if self.guidance.decoder != "auto":
            return self.guidance.decoder
        return "vae" if max(self.height, self.width) <= AUTO_PIXELS else "fitted"

    @property
    def group_size(self) -> int:
        """Samples in a group."""
        return self.classes_per_group * self.samples_per_class

    @property
    def drawn_classes(self) -> tuple[int, ...]:
        """Class numbers as often as they take part in one run through the classes."""
        weights = self.class_weights or (1,) * len(self.classes)
        return tuple(c for c, weight in enumerate(weights) for _ in range(weight))

    def word(self, class_number: int) -> str:
        """What prompts call a class, the first of several words."""
        return self.words(class_number)[0]

    def words(self, class_number: int) -> tuple[str, ...]:
        """All that prompts call a class, one of them drawn per sample."""
        return tuple(self.class_words[class_number].split("|")) if self.class_words else (self.classes[class_number],)

    def round_of(self, group: int) -> int:
        """The round that a group belongs to; a function of the recipe alone, so that a set can grow."""
        return min(group // (self.groups_per_round or self.groups_per_shard), self.rounds - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; raises SynthkdError for an unknown field or a wrong type."""
        values = _typed(cls, data, "")
        for name, nested in (("guidance", GuidanceSpec), ("cutmix", CutMixSpec)):
            if name in values:
                _check(isinstance(values[name], Mapping), name, values[name], "a table of fields")
                values[name] = nested(**_typed(nested, values[name], name + "."))
        _check("classes" in values, "classes", None, "a list of class names")
        return cls(**values)


def _typed(cls: type, data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Fields of a dataclass from plain values: lists become tuples, ints become floats, names are checked."""
    hints, known = get_type_hints(cls), [f.name for f in fields(cls)]
    out: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise SynthkdError(f"recipe: unknown field {_shown(prefix + name)}; {suggest(name, known)}")
        out[name] = _coerce(prefix + name, value, hints[name])
    return out


def _coerce(where: str, value: Any, hint: Any) -> Any:
    if get_args(hint):
        return _coerce_list(where, value, get_args(hint)[0])
    if isinstance(value, int) and not isinstance(value, bool):
        _check(abs(value) < 2**63, where, "a number of many digits", "one within 64 bits")
        return float(value) if hint is float else _kept(where, value, hint)
    return _kept(where, value, hint)


def _coerce_list(where: str, value: Any, kind: type) -> tuple[Any, ...]:
    listed = isinstance(value, (list, tuple))
    if listed and kind is float:
        value = [float(v) if type(v) is int and abs(v) < 2**53 else v for v in value]
    what = {str: "strings", float: "numbers"}.get(kind, "whole numbers")
    _check(listed and all(type(v) is kind for v in value), where, value, f"a list of {what}")
    return tuple(value)


def _kept(where: str, value: Any, hint: Any) -> Any:
    if hint in (int, float, str, bool):
        _check(type(value) is hint, where, value, f"a value of type {hint.__name__}")
    return value


@dataclass(frozen=True, kw_only=True)
class Request:
    """How many samples of a recipe, from which seed."""

    num_samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a count below 1 or a seed outside 64 bits."""
        if self.num_samples < 1:
            raise SynthkdError(f"num_samples is {self.num_samples}; expected a whole number >= 1")
        if not 0 <= self.seed < 2**63:
            raise SynthkdError(f"seed is {self.seed}; expected 0 <= seed < 2**63")


def fingerprint(recipe: Recipe, seed: int, guidance: Mapping[str, Any]) -> str:
    """SHA-256 of what was declared: recipe, seed and the guidance's own description; not the sample count."""
    declared = {name: value for name, value in recipe.to_dict().items() if name not in EXECUTION}
    text = json.dumps({"recipe": declared, "seed": seed, "guidance": guidance}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
