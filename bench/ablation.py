"""`synthkd bench ablation`: one idea at a time on and off, what it costs and what the student makes of it.

Times are against the preset without guidance, at the preset's own CFG interval, in one interleaved run for all variants
of a seed. A row that is there already, of the same settings, is not made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from synthkd.bench import quality
from synthkd.bench.engine import Row, Tell, Timing, count_embedded, rows_of, time_variants
from synthkd.bench.engine_cases import EMBEDDED, FULL_COST, Entrant, pick, recipe_with
from synthkd.bench.record import RESULTS, stamped
from synthkd.dfkd.presets import Preset, unguided
from synthkd.engine import CutMixSpec

Change = Callable[[Preset], Preset]
_PLAIN = "plain"
_HALVES: Mapping[str, tuple[float, float]] = {
    "first half": (0.0, 0.5),
    "second half": (0.5, 1.0),
    "middle": (0.25, 0.75),
}


def guidance_with(preset: Preset, **changes: Any) -> Preset:
    """The preset with other fields in its GuidanceSpec."""
    return recipe_with(preset, guidance=replace(preset.job.recipe.guidance, **changes))


def guiding(**changes: Any) -> Change:
    """A change of the GuidanceSpec."""
    return lambda preset: guidance_with(preset, **changes)


def drawing(**changes: Any) -> Change:
    """A change of the recipe."""
    return lambda preset: recipe_with(preset, **changes)


def teaching(**changes: Any) -> Change:
    """A change of the guidance's terms."""
    return lambda preset: replace(preset, job=replace(preset.job, **changes))


def small_groups(**terms: Any) -> Change:
    """One image per class and group, a quarter of the preset's; without Latent CutMix, which needs partners."""
    single = drawing(samples_per_class=1, cutmix=CutMixSpec())
    return lambda preset: single(teaching(**terms)(preset))


VARIANTS: dict[str, Change] = {
    "baseline": lambda preset: preset,
    "full cost": guiding(**FULL_COST),
    **{f"decoder {kind}": guiding(decoder=kind) for kind in ("vae", "pooled:2", "pooled:4")},
    "gradient unet": guiding(gradient="unet"),
    "guided everywhere": guiding(start=0.0, scale=0.7),
    "guided everywhere, every 2": guiding(start=0.0, every=2, scale=1.0),
    "every 2": guiding(every=2),
    "scale 0.4": guiding(scale=0.4),
    "scale 1.2": guiding(scale=1.2),
    **{f"guided {name}": guiding(start=span[0], stop=span[1]) for name, span in _HALVES.items()},
    "cfg all": drawing(cfg_start=0.0, cfg_stop=1.0),
    **{f"cfg {name}": drawing(cfg_start=span[0], cfg_stop=span[1]) for name, span in _HALVES.items()},
    "cfg none": drawing(cfg_start=0.0, cfg_stop=0.0),
    **{f"schedule {name}": guiding(schedule=name) for name in ("constant", "cosine", "polyak")},
    "looks 2": guiding(looks=2),
    "bn_momentum 0.5": teaching(bn_momentum=0.5),
    "no cutmix": drawing(cutmix=CutMixSpec()),
    "groups of 10": small_groups(),
    "groups of 10, bn_momentum 0.5": small_groups(bn_momentum=0.5),
    "groups of 10, bn_momentum 0.9": small_groups(bn_momentum=0.9),
    "previews": drawing(previews=(0.4, 0.6, 0.8)),
}


@dataclass(frozen=True, kw_only=True)
class AblationSpec:
    """What is measured: variants by name, seeds, timed rounds, images per set."""

    device: torch.device
    variants: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    repeats: int = 3
    num_images: int | None = None


def settings_digest(preset: Preset) -> str:
    """Of all that decides a variant's images and student, but for the seed."""
    job = preset.job
    plain = {
        "recipe": job.recipe.to_dict(), "student": asdict(preset.distill), "images": preset.num_images,
        "networks": [job.model, job.teacher, list(job.loras), preset.judge, preset.test_set, job.device],
        "weights": [job.alpha, job.beta, job.gamma, job.divergence, job.entropy, job.head, job.bn_momentum],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def recorded(name: str = "ablation") -> set[tuple[str, int, str]]:
    """(variant, seed, settings) of the rows of bench/results/NAME.jsonl that did not fail."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {(r["variant"], r["seed"], r["settings"]) for r in rows if not r.get("failed")}


def measure_ablation(
    spec: AblationSpec, preset: Preset, done: set[tuple[str, int, str]], tell: Tell = lambda _: None
) -> Iterator[Row]:
    """Rows of what is asked and not `done`, each as soon as its student is scored."""
    base = replace(preset.on(spec.device.type), num_images=spec.num_images or preset.num_images)
    made = {name: VARIANTS[name](base) for name in pick(VARIANTS, list(spec.variants))}
    digests = {name: settings_digest(found) for name, found in made.items()}
    for seed in spec.seeds:
        todo = [name for name in made if (name, seed, digests[name]) not in done]
        tell(f"seed {seed}: {len(todo)} of {len(made)} variants left")
        if todo:
            rows = _timed({name: Entrant(made[name]) for name in todo}, base, seed, spec, tell)
            jobs = {
                n: quality.QualityJob(Entrant(made[n]), seed, base.num_images)
                for n, r in rows.items()
                if not r["failed"]
            }
            failed = [{**row, "settings": digests[name]} for name, row in rows.items() if row["failed"]]
            yield from map(stamped, failed)
            for name, found in quality.score_all(jobs):
                tell(f"seed {seed}, {name}: {found}")
                yield stamped({**rows[name], "num_images": base.num_images, **found, "settings": digests[name]})


def _timed(entrants: Mapping[str, Entrant], base: Preset, seed: int, spec: AblationSpec, tell: Tell) -> dict[str, Row]:
    """Rows without quality by variant, timed against the preset without guidance."""
    everyone = {_PLAIN: Entrant(replace(base, job=unguided(base.job))), **entrants}
    timing: Timing = time_variants({n: e.build for n, e in everyone.items()}, spec.device, seed, spec.repeats, tell)
    counts = {name: count_embedded(entrant) for name, entrant in entrants.items()}
    rows = rows_of(EMBEDDED, seed, timing, counts, {})
    return {row["variant"]: {**row, "kind": "ablation"} for row in rows}
