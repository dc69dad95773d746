"""What a group's calls need beside networks, as a function of (recipe, seed, unit, attempt), made before the loop."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from synthkd.engine import augment, rng
from synthkd.engine.config import Recipe
from synthkd.engine.errors import SynthkdError
from synthkd.engine.guidance import step_sizes
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.plan import WorkUnit
from synthkd.engine.sampler import Steering
from synthkd.engine.schedule import Tables, solver_tables


def noise(shape: Sequence[int], ids: Iterable[int], seed: int, purpose: str, attempt: int) -> Tensor:
    """Standard normal noise [B,C,h,w] of samples, float32 on the host."""
    rows = [rng.normal(seed, i, purpose, int(np.prod(shape)), attempt) for i in ids]
    return torch.from_numpy(np.stack(rows)).view(-1, *shape)


def steering(
    recipe: Recipe, unit: WorkUnit, seed: int, attempt: int, tables: Tables, shape: Sequence[int], dtype: torch.dtype,
    first: int = 0,
) -> Steering:  # fmt: skip
    """Sizes, targets, source maps, fresh noise and views of every call, on the tables' device; no loss yet.

    first: the call at which the run begins; what comes before it exchanges nothing.
    """
    device = tables.timesteps.device
    targets, maps = _exchanges(recipe, unit, seed, attempt, shape, first)
    fresh = [
        noise(shape, unit.ids, seed, f"noise {i}", attempt).to(device=device, dtype=dtype) if used else None
        for i, used in enumerate(noisy and i >= first for i, noisy in enumerate(tables.noisy))
    ]
    return Steering(
        loss=None,
        decode=torch.nn.Identity(),
        spec=recipe.guidance,
        sizes=step_sizes(recipe.guidance, tables.rows.sigma),
        targets=[t.to(device) for t in targets],
        maps=[None if m is None else m.to(device, torch.int32) for m in maps],
        noise=fresh,
        looks=_looks(recipe, unit, seed, attempt, device),
        cfg=tuple(recipe.cfg_active(i) for i in range(recipe.steps)),
        keep=tuple(recipe.preview_call(p) for p in recipe.previews),
        first=first,
    )


def _exchanges(
    recipe: Recipe, unit: WorkUnit, seed: int, attempt: int, shape: Sequence[int], first: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Targets [B,K] before each call and after the last, and the source map after each call."""
    classes, (_, height, width) = torch.tensor(unit.classes), shape
    source = torch.arange(len(unit.ids)).view(-1, 1, 1).repeat(1, height, width)
    targets, maps = [one_hot(classes, len(recipe.classes)).float()], []
    for i in range(recipe.steps):
        target, event = targets[-1], None
        if i >= first and recipe.cutmix.active(i, recipe.steps):
            event = augment.event_map(
                unit.classes, recipe.cutmix, height, width, seed=seed, group=unit.group, event=i, attempt=attempt
            )
            source = augment.compose(source, event)
            if recipe.cutmix.scope == "any":
                target = augment.area_targets(source, classes, len(recipe.classes))
        targets.append(target)
        maps.append(event)
    return targets, maps


def _looks(
    recipe: Recipe, unit: WorkUnit, seed: int, attempt: int, device: torch.device
) -> list[list[augment.Look]]:
    spec, steps = recipe.guidance, recipe.steps
    return [
        [
            augment.look(unit.ids, spec, device, seed=seed, call=i, view=view, attempt=attempt)
            for view in range(1, spec.looks if spec.active(i, steps) else 1)
        ]
        for i in range(steps)
    ]


def check_prompts(prior: LatentModel, recipe: Recipe) -> None:
    """Refuse a class that the prior cannot draw now, not when its group comes."""
    words = [word for c in sorted(set(recipe.drawn_classes)) for word in recipe.words(c)]
    prompts = (template.replace("{class}", word) for template in recipe.prompts for word in words)
    prior.check_prompts(prompts, recipe.negative_prompt)


def tables_of(model: LatentModel, recipe: Recipe) -> Tables:
    """The solver's tables; raises SynthkdError where recipe and prior disagree."""
    config = model.scheduler_config
    tables = solver_tables(
        config,
        recipe.steps,
        model.device,
        model.dtype,
        sampler=recipe.sampler,
        eta=recipe.eta,
        spacing=recipe.spacing,
    )
    if recipe.prediction_type not in ("model", tables.prediction_type):
        raise SynthkdError(
            f"recipe: prediction_type is {recipe.prediction_type!r}; the prior's scheduler says "
            f"{tables.prediction_type!r}: leave the field out, or mend the prior's scheduler_config.json"
        )
    return tables
