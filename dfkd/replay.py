"""One image again, from the manifest alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from synthkd.dfkd.decoding import obey
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.rounds import student_card
from synthkd.engine import Synthesizer
from synthkd.engine.backends import Execution
from synthkd.engine.batch import SampleStream
from synthkd.engine.compiled import MODES, CompileChoice
from synthkd.engine.config import Recipe, Request
from synthkd.engine.declared import OverlapError
from synthkd.engine.encoders import encoder_of
from synthkd.engine.errors import SynthkdError
from synthkd.engine.fusion import FuseChoice
from synthkd.engine.index import read_environments, read_manifest
from synthkd.engine.memory import MemoryPlan, plan_of
from synthkd.engine.plan import Plan, sample_key
from synthkd.engine.reading import decode_image, members
from synthkd.engine.rows import group_rows, read_index
from synthkd.engine.runner import open_stream
from synthkd.export import ExportError, Options

_log = logging.getLogger("synthkd")


@dataclass(frozen=True)
class Again:
    """How groups of a set are drawn again, from its manifest alone; as `replay_sample` says.

    workers: processes that draw.
    """

    set_dir: Path
    device: str
    allow_code: bool = False
    fuse: str | None = None
    artifacts: str | None = None
    workers: int = 1
    moved: Mapping[str, str | None] = field(default_factory=dict)

    def stream(self, plan: Plan, round_: int, said: Mapping[str, Any]) -> SampleStream:
        """Groups of a round, drawn as they were in an environment (empty: not known).

        Raises SynthkdError where model, teacher, student or decoder are not the ones that drew the set.
        """
        manifest = read_manifest(self.set_dir)
        job = replace(SynthJob.from_manifest(manifest, self.device, self.allow_code, **self.moved), again=True)
        _say_what_was_seen(job)
        chosen: Any = self.fuse or _fused(said)  # checked when the job is built
        execution = replace(_execution(said), artifacts=self.artifacts)
        job = obey(replace(job, fuse=chosen, compile=_compiled(said), execution=execution), self.set_dir)
        parts = plan_of(plan.recipe.group_size, said.get("micro_batch"))
        factory = _Factory(job.at_round(round_, student_card(self.set_dir, round_)), parts)
        stream: SampleStream = open_stream(factory, plan, self.workers)
        identity = stream.identity
        for name in ("model_sha256", "fingerprint"):
            if identity[name] != manifest[name]:
                raise SynthkdError(f"{self.set_dir}: model or teacher changed since the set was drawn ({name} differs)")
        return stream


@dataclass(frozen=True)
class _Factory:
    """Builds a job's Synthesizer, here or in a worker, that takes a group in the parts it was drawn in."""

    job: SynthJob
    parts: MemoryPlan | None

    def __call__(self) -> Synthesizer:
        made = self.job.build()
        if self.parts is not None:
            made.memory = self.parts
        return made


def replay_sample(
    set_dir: Path,
    sample_id: int,
    target: Path | None,
    device: str,
    allow_code: bool = False,
    fuse: str | None = None,
    artifacts: str | None = None,
    **moved: str | None,
) -> tuple[Path, str]:
    """Redraw a sample's group, write the sample, and say how it compares with the stored one.

    fuse: see `Synthesizer`; None for what the group was drawn with, as its parts, compilation and backends are.
    artifacts: folder of built backends.
    moved: `model` and `teacher`, where they lie elsewhere now; weights are checked by digest all the same.

    Raises SynthkdError for an id outside the set, or where model or teacher are not the ones that drew it.
    """
    manifest = read_manifest(set_dir)
    recipe = Recipe.from_dict(manifest["recipe"])
    count = int(manifest["num_samples"])
    if not 0 <= sample_id < count:
        raise SynthkdError(f"--id {sample_id}: the set has samples 0 to {count - 1}")
    group, place = divmod(sample_id, recipe.group_size)
    plan = Plan(recipe, Request(num_samples=count, seed=manifest["seed"]))
    said = _environment(set_dir, group, place, group // recipe.groups_per_shard)
    again = Again(set_dir, device, allow_code, fuse, artifacts, moved=moved)
    stream = again.stream(plan, recipe.round_of(group), said)
    batch = next(stream.draw([plan.unit(group)]))
    at = batch.ids.index(sample_id)
    pixels = batch.images[at : at + 1].permute(0, 2, 3, 1).contiguous()
    encode = encoder_of(said, recipe.image_format, pixels.device.type)
    data = encode(pixels, recipe.image_format, recipe.image_quality)[0]
    path = target or Path(f"{sample_key(sample_id)}.{recipe.image_format}")
    path.write_bytes(data)
    return path, _compare(set_dir, group // recipe.groups_per_shard, sample_id, data, recipe)


def _say_what_was_seen(job: SynthJob) -> None:
    """The set is there: that its prior is not apart from its teacher's data is said, and refuses nothing."""
    try:
        job.check_apart()
    except OverlapError as error:
        _log.warning("%s; the set is there, so its images are drawn again all the same", error)


def _environment(set_dir: Path, group: int, place: int, shard: int) -> Mapping[str, Any]:
    """The environment that a sample of a group was drawn in; empty where sample or environment are not known."""
    row = read_index(set_dir).get(shard)
    keys = next((g.environments for g in group_rows(set_dir, row) if g.group == group), []) if row else []
    return read_environments(set_dir).get(keys[place] if place < len(keys) else "", {})


def _compiled(environment: Mapping[str, Any]) -> CompileChoice:
    """How calls were compiled in an environment; `auto` where it is not known."""
    said = str(environment.get("backend", ""))
    found: dict[str, CompileChoice] = {f"compiled {mode}": mode for mode in MODES}
    return next((mode for words, mode in found.items() if said.endswith(words)), "off" if said else "auto")


def _execution(environment: Mapping[str, Any]) -> Execution:
    """What networks ran on in an environment; as the recipe says where it is not known."""
    if not environment:
        return Execution()
    entries = [entry.split(" ") for entry in str(environment.get("roles", "")).split(", ") if entry.count(" ") == 1]
    told = dict(entries)
    attention, quantize = told.pop("attention", "sdpa"), told.pop("quantize", "")
    fixed, plain = told.pop("fixed_batch", "") == "True", Options().to_dict()
    try:
        options = Options.from_dict({name: _as(told.pop(name), plain[name]) for name in plain if name in told})
    except (ValueError, ExportError) as error:
        said = environment.get("roles")
        raise SynthkdError(f"environments: roles says {said!r}, which no set has ({error})") from error
    backends = ("eager", *(f"{role}={name}" for role, name in told.items()))
    return Execution(backends=backends, attention=attention, quantize=quantize, fixed_batch=fixed, options=options)


def _as(text: str, like: Any) -> Any:
    """A plain value from its text."""
    return text == "True" if isinstance(like, bool) else type(like)(text)


def _fused(environment: Mapping[str, Any]) -> FuseChoice:
    """What was fused in an environment; `auto` where it is not known."""
    said = str(environment.get("backend", ""))
    parts: dict[str, FuseChoice] = {"fused decoder and denoiser": "all", "fused decoder": "decoder"}
    return next((choice for words, choice in parts.items() if words in said), "off" if said else "auto")


def _compare(set_dir: Path, shard: int, sample_id: int, data: bytes, recipe: Recipe) -> str:
    row = read_index(set_dir).get(shard)
    name = f"{sample_key(sample_id)}.{recipe.image_format}"
    found = (data for member, data in members(set_dir / row.file) if member == name) if row else iter(())
    stored = next(found, None)
    if stored is None:
        return "drawn; the set holds no such image yet"
    if stored == data:
        return "identical to the stored image"
    a, b = (decode_image(x, name).astype(np.int16) for x in (stored, data))
    return f"differs from the stored image by at most {np.abs(a - b).max()} of 255 (another environment?)"
