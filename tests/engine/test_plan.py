"""The plan: arithmetic only, balanced classes, the same groups at any count, O(1) at any size."""

import ast
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from synthkd.engine import Plan, Recipe, Request, plan
from synthkd.engine.plan import sample_key


def _recipe(classes: int, per_group: int, each: int = 2, per_shard: int = 3) -> Recipe:
    names = tuple(f"c{i}" for i in range(classes))
    return Recipe(classes=names, classes_per_group=per_group, samples_per_class=each, groups_per_shard=per_shard)


@pytest.mark.parametrize("module", ["plan", "rng", "config", "errors"])
def test_planning_imports_no_torch(module: str) -> None:
    tree = ast.parse((Path(plan.__file__).parent / f"{module}.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {n for n in names if n.split(".")[0] in ("torch", "diffusers", "transformers")}
    pure = {"synthkd.engine", "synthkd.engine.config", "synthkd.engine.errors", "synthkd.engine.rng"}
    assert {n for n in names if n.startswith("synthkd")} <= pure


@pytest.mark.parametrize(("classes", "per_group"), [(3, 3), (10, 5), (10, 2), (12, 4), (7, 1)])
def test_a_group_has_each_of_its_classes_m_times(classes: int, per_group: int) -> None:
    made = Plan(_recipe(classes, per_group, each=3), Request(num_samples=500))
    for unit in made.units():
        counts = Counter(unit.classes)
        assert len(counts) == per_group
        assert set(counts.values()) == {3}


@pytest.mark.parametrize(("classes", "per_group"), [(10, 4), (7, 3), (10, 10), (5, 2), (1000, 10)])
@pytest.mark.parametrize("seed", [0, 1])
def test_classes_are_balanced_over_the_plan(classes: int, per_group: int, seed: int) -> None:
    """Also where the classes do not divide into groups: counts differ by one group's share at most."""
    groups = 3 * classes
    made = Plan(_recipe(classes, per_group), Request(num_samples=groups * per_group * 2, seed=seed))
    counts = Counter(c for unit in made.units() for c in unit.classes)
    assert set(counts) == set(range(classes))
    assert set(counts.values()) == {2 * 3 * per_group}
    for some in (1, 2, groups // 2):
        begun = Counter(c for g in range(some) for c in made.unit(g).classes)
        assert max(begun.values()) - min(begun[c] for c in range(classes)) <= 2


@pytest.mark.parametrize(("classes", "per_group"), [(10, 4), (7, 3), (5, 2)])
def test_every_member_has_a_partner_where_classes_do_not_divide(classes: int, per_group: int) -> None:
    made = Plan(_recipe(classes, per_group), Request(num_samples=400))
    for unit in made.units():
        assert len(unit.classes) == 2 * per_group
        assert min(Counter(unit.classes).values()) >= 2


def test_ids_shards_and_the_padded_tail() -> None:
    made = Plan(_recipe(3, 3), Request(num_samples=20))
    assert (made.num_groups, made.num_shards) == (4, 2)
    units = list(made.units())
    assert [(u.group, u.shard, u.ids.start, u.kept) for u in units] == [
        (0, 0, 0, 6),
        (1, 0, 6, 6),
        (2, 0, 12, 6),
        (3, 1, 18, 2),
    ]
    assert all(len(u.ids) == len(u.classes) == 6 for u in units)
    assert [u.group for u in made.units([1, 0])] == [3, 0, 1, 2]
    for group in (-1, 4):
        with pytest.raises(IndexError, match=rf"group {group} is outside 0\.\.3"):
            made.unit(group)


def test_a_group_does_not_know_how_many_follow() -> None:
    small, large = (Plan(_recipe(10, 4), Request(num_samples=n, seed=3)) for n in (50, 5000))
    for unit in small.units():
        other = large.unit(unit.group)
        assert (unit.ids, unit.classes, unit.shard) == (other.ids, other.classes, other.shard)
    assert [u.classes for u in small.units()] != [
        u.classes for u in Plan(_recipe(10, 4), Request(num_samples=50, seed=4)).units()
    ]


def test_a_billion_samples_cost_nothing() -> None:
    made = Plan(_recipe(1000, 10), Request(num_samples=10**9))
    started = time.perf_counter()
    for group in (0, made.num_groups // 2, made.num_groups - 1):
        unit = made.unit(group)
        assert unit.ids.start == 20 * group
        assert len(set(unit.classes)) == 10
    assert next(iter(made.shard_units(made.num_shards - 1))).kept == 20
    assert time.perf_counter() - started < 1.0
    assert made.num_groups * 20 == 10**9


@pytest.mark.parametrize(("number", "key"), [(0, "000000000"), (17_431_007, "017431007"), (10**10, "10000000000")])
def test_keys(number: int, key: str) -> None:
    assert sample_key(number) == key


def test_prompts_are_drawn_per_sample(synthesizer: Callable[..., object]) -> None:
    synth = synthesizer()
    made = synth.stream(Request(num_samples=300)).plan  # type: ignore[attr-defined]
    drawn = [p for u in made.units() for p in synth.prompts(u, 0)]  # type: ignore[attr-defined]
    names = [made.recipe.classes[c] for u in made.units() for c in u.classes]
    assert all(p in (f"a photo of a {n}", f"a {n}") for p, n in zip(drawn, names, strict=True))
    assert 100 < sum(p.startswith("a photo") for p in drawn) < 200
