"""A synthesis job as plain values: enough to build its Synthesizer here, in a worker, or for a replay."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
        data = asdict(self)
        del data["recipe"], data["device"]
        return data

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], device: str) -> "SynthJob":
        """The job that made a set; raises SynthkdError where the manifest does not say."""
        source = manifest.get("source") or {}
        if not {"model", "teacher", "alpha", "beta"} <= set(source):
            raise SynthkdError("manifest.json names no model and teacher: replay this set from Python")
        values = {name: source[name] for name in ("model", "teacher", "alpha", "beta")}
        return cls(**values, recipe=Recipe.from_dict(manifest["recipe"]), device=device)
