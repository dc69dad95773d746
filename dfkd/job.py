"""A synthesis job as plain values: enough to build its Synthesizer here, in a worker, or for a replay."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from synthkd.dfkd import apart
from synthkd.dfkd.cards import CLASSIFICATION
from synthkd.dfkd.distill_spec import DistillSpec, spec_from
from synthkd.dfkd.fields import AMOUNT, TABLE, TEXT, TEXTS, Kind, check_fields, check_value
from synthkd.dfkd.methods.diffdfkd import KIND, TeacherGuidance
from synthkd.dfkd.patches import check_patches, load_patches
from synthkd.dfkd.teachers import Teacher, card_path, load_teacher, read_card
from synthkd.engine import Execution, Recipe, Synthesizer, SynthkdError
from synthkd.engine.compiled import COMPILE_CHOICES, CompileChoice
from synthkd.engine.errors import suggest
from synthkd.engine.fitted import read_card as read_decoder_card
from synthkd.engine.fusion import FUSE_CHOICES, FuseChoice
from synthkd.engine.memory import checked_part
from synthkd.engine.models import EMBEDDED
from synthkd.engine.roles import parse_backends

_WEIGHTS = ("alpha", "beta", "gamma", "divergence", "entropy", "head", "bn_momentum", "patch")
_WEIGHT_KINDS: Mapping[str, Kind] = {name: TEXT if name == "divergence" else AMOUNT for name in _WEIGHTS}
_SOURCE_KINDS: Mapping[str, Kind] = {
    "model": TEXT, "teacher": TEXT, "loras": TEXTS, "round_student": TABLE, "patches": TEXT,
}  # fmt: skip
_LARGEST_ZOOM = 4


@dataclass(frozen=True, kw_only=True)
class SynthJob:
    """model: folder, hub id or `embedded:NAME`; loras: fused into it, `PATH[@WEIGHT]`; teacher: a card.

    An empty model is of presets whose methods need no prior: `check` refuses to draw with it.
    alpha, beta, gamma, divergence, entropy, head, bn_momentum, patch: the guidance's terms (see `TeacherGuidance`).
    patches: folder of a patch discriminator that `synthkd fit-patches` wrote, for the last of them.
    round_student: how the student is trained that the later rounds disagree with; round, student: which round this job
    draws, and the card of that student. allow_code: whether a card may name a `module:callable`; no manifest keeps it.
    fuse, compile, micro_batch, execution: how networks run (see `Synthesizer`), which no manifest keeps either.
    look: what guidance looks through where the set's calibration decided (see `dfkd.decoding`), None for the recipe's.
    model_missing: what is said where the model, a folder that has to be made first, is not there.
    again: draws images of a set that is there, so that `check` passes over a prior that has seen the teacher's data.
    """

    model: str
    teacher: str
    recipe: Recipe
    alpha: float = 0.1
    beta: float = 1.0
    gamma: float = 0.0
    divergence: str = "kl"
    entropy: float | None = None
    head: float | None = None
    bn_momentum: float = 0.0
    patch: float = 0.0
    patches: str = ""
    loras: tuple[str, ...] = ()
    round_student: DistillSpec = field(default_factory=DistillSpec)
    round: int = 0
    student: str | None = None
    allow_code: bool = False
    device: str = "cpu"
    fuse: FuseChoice = "auto"
    compile: CompileChoice = "auto"
    micro_batch: int | Literal["auto"] = "auto"
    look: str | None = None
    model_missing: str = ""
    execution: Execution = Execution()  # noqa: RUF009
    again: bool = False

    def check(self) -> None:
        """Raise SynthkdError where teacher, recipe and rounds disagree, or the prior is not apart; reads no weights."""
        if not self.model:
            raise SynthkdError("model is empty: this preset has no diffusion prior to draw with; name another method")
        if self.model_missing and not (Path(self.model) / "model_index.json").is_file():
            raise SynthkdError(self.model_missing)
        card = read_card(card_path(self.teacher))
        if not self.again:
            self.check_apart()
        recipe = self.recipe
        if self.fuse not in FUSE_CHOICES:
            raise SynthkdError(f"fuse {self.fuse!r}: {suggest(self.fuse, FUSE_CHOICES)}")
        checked_part(self.micro_batch)
        if self.compile not in COMPILE_CHOICES:
            raise SynthkdError(f"compile {self.compile!r}: {suggest(self.compile, COMPILE_CHOICES[:-1])}")
        parse_backends((*recipe.backends, *self.execution.backends))
        if (decoder := recipe.guidance.decoder).startswith("fitted:"):
            read_decoder_card(decoder.removeprefix("fitted:"))
        if card.task != CLASSIFICATION:
            raise SynthkdError(
                f"teacher {self.teacher!r} is of the task {card.task!r}; a diffusion prior is guided by classifiers, "
                "so train its student with --method mosaickd or pool"
            )
        if len(card.classes) != len(recipe.classes):
            raise SynthkdError(
                f"teacher {self.teacher!r} has {len(card.classes)} outputs, the recipe names "
                f"{len(recipe.classes)} classes; list them in the order of the teacher's outputs"
            )
        zoom = max(card.input_size[0] / recipe.height, card.input_size[1] / recipe.width)
        if zoom > _LARGEST_ZOOM:
            size, drawn = (f"{h}x{w}" for h, w in (card.input_size, (recipe.height, recipe.width)))
            raise SynthkdError(
                f"teacher {self.teacher!r} reads images of {size}, the prior draws {drawn}: enlarged {zoom:.1f} times "
                f"they tell it nothing; raise height and width to at least a {_LARGEST_ZOOM}th of its input"
            )
        if self.patch > 0 and not self.patches:
            raise SynthkdError(f"patch is {self.patch}, but no patches are named; make some with `synthkd fit-patches`")
        if self.patch > 0:
            check_patches(self.patches)
        if self.gamma > 0 and recipe.rounds < 2:
            raise SynthkdError(
                f"gamma is {self.gamma}, but rounds is {recipe.rounds}: there is a student to disagree with only from "
                "the second round on; set rounds to 2 or more, or gamma to 0"
            )
        if self.gamma > 0 and recipe.guidance.scale == 0:
            raise SynthkdError(f"gamma is {self.gamma}, but guidance.scale is 0, which guides nothing; set one of them")
        if recipe.rounds > 1 and self.gamma == 0:
            raise SynthkdError(f"rounds is {recipe.rounds}, but gamma is 0: nothing would change between rounds")

    def check_apart(self) -> None:
        """Raise OverlapError where a network that draws has seen the teacher's data, as both declare it."""
        apart.check_parts(self.seen(), self.teacher)

    def seen(self) -> dict[str, apart.Names]:
        """What every network beside the teacher declares that it was trained on; the prior first, where there is one.

        Raises SynthkdError for a declaration that cannot be read.
        """
        named = {f"prior {self.model!r}": self.model} if self.model else {}
        named |= {f"lora {entry!r}": _without_weight(entry)[0] for entry in self.loras}
        if self.patch > 0 and self.patches:
            named[f"patches {self.patches!r}"] = self.patches
        kind, _, decoder = self.recipe.guidance.decoder.partition(":")
        if kind in ("fitted", "tiny") and not decoder.startswith(EMBEDDED):
            named[f"decoder {decoder!r}"] = decoder
        return {what: apart.model_declares(reference) for what, reference in named.items()}

    def build(self) -> Synthesizer:
        """Load prior and teacher, and the round's student; picklable as a worker's factory."""
        self.check()
        guidance = self.guidance(load_teacher(self.teacher, self.device, allow_code=self.allow_code))
        return Synthesizer.from_pretrained(
            self.model, self.recipe, guidance=guidance, device=self.device, loras=self.loras, fuse=self.fuse,
            compile=self.compile, micro_batch=self.micro_batch, look=self.look, execution=self.execution,
        )  # fmt: skip

    def guidance(self, teacher: Teacher) -> TeacherGuidance:
        """The loss of this job's round."""
        weights = {name: getattr(self, name) for name in _WEIGHTS}
        student = load_teacher(self.student, self.device) if self.student else None
        about = {"round_student": asdict(self.round_student)}
        patches = load_patches(self.patches, self.device) if self.patch > 0 else None
        return TeacherGuidance(teacher, **weights, student=student, round=self.round, about=about, patches=patches)

    def at_round(self, round_: int, student: Path | None) -> "SynthJob":
        """The job of one round, with its student's card."""
        return replace(self, round=round_, student=str(student) if student else None)

    def declared(self) -> dict[str, Any]:
        """What decides the images of a set beside its seed and its teacher's weights, as plain values."""
        weights = {name: getattr(self, name) for name in _WEIGHTS}
        return {**self.source(), **weights, "recipe": self.recipe.to_dict()}

    def source(self) -> dict[str, Any]:
        """What a manifest keeps for `synthkd replay`, beside the recipe and the guidance's weights."""
        out: dict[str, Any] = {"model": _absolute(self.model), "teacher": _absolute(self.teacher)}
        if self.loras:
            out["loras"] = [_absolute_lora(lora) for lora in self.loras]
        if self.patch > 0:
            out["patches"] = _absolute(self.patches)
        if self.gamma > 0:
            out["round_student"] = asdict(self.round_student)
        return out

    def trained_on(self) -> dict[str, str]:
        """What the teacher and all that draws declare that they were trained on, in words, by what they are.

        Keys: `teacher`, `prior`, `lora`, `patches` and `decoder`, each where there is one; LoRAs from the second on are
        `lora 2` and so on.
        """
        found: dict[str, apart.Names] = {apart.TEACHER: apart.card_declares(self.teacher)}
        for what, names in self.seen().items():
            kind = what.partition(" ")[0]
            several = sum(1 for name in found if name.partition(" ")[0] == kind)
            found[f"{kind} {several + 1}" if several else kind] = names
        return apart.told(**found)

    def origin(self) -> dict[str, Any]:
        """What a manifest keeps of the networks: `source`, and what they declare, which no fingerprint knows."""
        return {**self.source(), "declared": self.trained_on()}

    @classmethod
    def from_manifest(
        cls, manifest: Mapping[str, Any], device: str, allow_code: bool = False, **moved: str | None
    ) -> "SynthJob":
        """The job that made a set; `moved` overrides model or teacher where they lie elsewhere now.

        Raises SynthkdError where the manifest does not say, or says it with a value of the wrong type.
        """
        source = read_source(manifest, **moved)
        declared = manifest["guidance"]
        check_value("manifest.json: guidance", declared, TABLE)
        if not {"model", "teacher"} <= set(source) or declared.get("kind") != KIND:
            raise SynthkdError(
                "manifest.json names no model and teacher (written from Python): pass --model and --teacher"
            )
        weights = {name: declared[name] for name in _WEIGHTS if name in declared}
        check_fields("manifest.json: guidance", weights, _WEIGHT_KINDS, joint=".")
        # A weight that the manifest does not name was 0, whatever is the default today.
        values = {"model": source["model"], "teacher": source["teacher"], "entropy": 0.0, "head": 0.0}
        values |= weights | {"patches": source.get("patches", "")}
        values["loras"] = tuple(source.get("loras", ()))
        if "round_student" in source:
            values["round_student"] = spec_from(source["round_student"], "manifest.json: source.round_student")
        return cls(**values, recipe=Recipe.from_dict(manifest["recipe"]), device=device, allow_code=allow_code)


def read_source(manifest: Mapping[str, Any], **moved: str | None) -> dict[str, Any]:
    """What a manifest says of model, teacher, loras and round_student, with those of `moved` in their place.

    Raises SynthkdError for a value of the wrong type.
    """
    found = manifest.get("source")
    check_value("manifest.json: source", {} if found is None else found, TABLE)
    source = dict(found or {}) | {name: place for name, place in moved.items() if place is not None}
    known = {name: source[name] for name in _SOURCE_KINDS if name in source}
    check_fields("manifest.json: source", known, _SOURCE_KINDS, joint=".")
    return known


def _absolute(reference: str) -> str:
    """A local path in full, so that a replay works from anywhere; a hub id or `embedded:NAME` as it is."""
    return str(Path(reference).resolve()) if Path(reference).exists() else reference


def _absolute_lora(entry: str) -> str:
    """The same for `PATH[@WEIGHT]`."""
    path, weight = _without_weight(entry)
    return _absolute(path) + weight


def _without_weight(entry: str) -> tuple[str, str]:
    """Path and `@WEIGHT` of a LoRA, read as `load_model` reads it: a path that is there has no weight."""
    path, at, weight = entry.rpartition("@")
    return (entry, "") if not path or Path(entry).exists() else (path, at + weight)
