"""A synthesis job as plain values: enough to build its Synthesizer here, in a worker, or for a replay."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.teachers import card_path, load_teacher, read_card
from synthkd.engine import Recipe, Synthesizer, SynthkdError


@dataclass(frozen=True, kw_only=True)
class SynthJob:
    """model: folder, hub id or `embedded:NAME`; teacher: a card; alpha, beta: weights of its terms."""

    model: str
    teacher: str
    recipe: Recipe
    alpha: float = 0.1
    beta: float = 1.0
    device: str = "cpu"

    def check(self) -> None:
        """Raise SynthkdError where teacher and recipe disagree; reads no weights."""
        card = read_card(card_path(self.teacher))
        if len(card.classes) != len(self.recipe.classes):
            raise SynthkdError(
                f"teacher {self.teacher!r} has {len(card.classes)} outputs, the recipe names "
                f"{len(self.recipe.classes)} classes; list them in the order of the teacher's outputs"
            )

    def build(self) -> Synthesizer:
        """Load prior and teacher; picklable as a worker's factory."""
        self.check()
        guidance = TeacherGuidance(load_teacher(self.teacher, self.device), alpha=self.alpha, beta=self.beta)
        return Synthesizer.from_pretrained(self.model, self.recipe, guidance=guidance, device=self.device)

    def source(self) -> dict[str, Any]:
        """What a manifest keeps for `synthkd replay`, beside the recipe."""
        weights = {"alpha": self.alpha, "beta": self.beta}
        return {"model": _absolute(self.model), "teacher": _absolute(self.teacher), **weights}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], device: str, **moved: str | None) -> "SynthJob":
        """The job that made a set; `moved` overrides model or teacher where they lie elsewhere now.

        Raises SynthkdError where the manifest does not say.
        """
        source = {"alpha": manifest["guidance"].get("alpha"), "beta": manifest["guidance"].get("beta")}
        source |= manifest.get("source") or {}
        source |= {name: place for name, place in moved.items() if place is not None}
        if not {"model", "teacher", "alpha", "beta"} <= set(source):
            raise SynthkdError(
                "manifest.json names no model and teacher (written from Python): pass --model and --teacher"
            )
        values = {name: source[name] for name in ("model", "teacher", "alpha", "beta")}
        return cls(**values, recipe=Recipe.from_dict(manifest["recipe"]), device=device)


def _absolute(reference: str) -> str:
    """A local path in full, so that a replay works from anywhere; a hub id or `embedded:NAME` as it is."""
    return str(Path(reference).resolve()) if Path(reference).exists() else reference
