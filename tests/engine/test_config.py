"""Recipe and Request: every check names its field, plain values round-trip, the fingerprint sees every field."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest

from synthkd.engine import CutMixSpec, GuidanceSpec, Recipe, Request, SynthkdError
from synthkd.engine.config import fingerprint

NAN, INF = float("nan"), float("inf")
MIX = CutMixSpec(every=1, last_clean=1)


def _refused(make: Callable[[], object], field: str) -> None:
    with pytest.raises(SynthkdError) as caught:
        make()
    text = str(caught.value)
    assert field in text
    assert "expected" in text or "known:" in text
    assert "\n" not in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", ()),
        ("classes", ("cat", "cat", "dog")),
        ("prompts", ()),
        ("prompts", ("a photo of a {class}", "a photo")),
        ("height", 0),
        ("width", -8),
        ("steps", 0),
        ("classes_per_group", 0),
        ("classes_per_group", 4),
        ("samples_per_class", 0),
        ("groups_per_shard", 0),
        ("sampler", "dimd"),
        ("dtype", "float23"),
        ("image_format", "jpeg"),
        ("image_quality", 0),
        ("image_quality", 101),
        ("attempts", 0),
        ("guidance_scale", NAN),
        ("guidance_scale", INF),
    ],
)
def test_a_recipe_names_the_field_that_is_wrong(recipe: Callable[..., Recipe], field: str, value: Any) -> None:
    _refused(lambda: recipe(**{field: value}), field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", -0.1),
        ("scale", NAN),
        ("scale", INF),
        ("schedule", "sigmoid"),
        ("gradient", "x1"),
        ("start", -0.1),
        ("start", 1.0),
        ("stop", 1.1),
        ("stop", NAN),
        ("every", 0),
        ("decoder", "taesd"),
    ],
)
def test_a_guidance_names_the_field_that_is_wrong(field: str, value: Any) -> None:
    named = "start, stop" if field in ("start", "stop") else field
    _refused(lambda: GuidanceSpec(**{field: value}), f"guidance.{named}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", -1), ("last_clean", 0), ("alpha", 0.0), ("alpha", NAN), ("alpha", INF), ("scope", "classes")],
)
def test_a_cutmix_names_the_field_that_is_wrong(field: str, value: Any) -> None:
    _refused(lambda: CutMixSpec(**{field: value}), f"cutmix.{field}")


@pytest.mark.parametrize(("field", "value"), [("num_samples", 0), ("num_samples", -1), ("seed", -1), ("seed", 2**63)])
def test_a_request_names_the_field_that_is_wrong(field: str, value: int) -> None:
    _refused(lambda: Request(**{"num_samples": 1, field: value}), field)


def test_nothing_can_be_changed_afterwards(recipe: Callable[..., Recipe]) -> None:
    for thing, name in ((recipe(), "steps"), (GuidanceSpec(), "scale"), (CutMixSpec(), "every")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, name, 1)
    with pytest.raises(TypeError):
        GuidanceSpec(0.3)  # type: ignore[misc]


def test_a_replaced_recipe_is_checked_again(recipe: Callable[..., Recipe]) -> None:
    _refused(lambda: replace(recipe(), steps=0), "steps")


def test_plain_values_round_trip(recipe: Callable[..., Recipe]) -> None:
    made = recipe(
        guidance=GuidanceSpec(scale=0.3, gradient="unet"), cutmix=CutMixSpec(every=2, last_clean=1, scope="any")
    )
    assert Recipe.from_dict(made.to_dict()) == made
    assert Recipe.from_dict({"classes": ["a"], "classes_per_group": 1}).prompts == ("a photo of a {class}",)


@pytest.mark.parametrize("scale", [3, 3.0])
def test_a_whole_number_is_the_same_recipe_as_its_float(recipe: Callable[..., Recipe], scale: Any) -> None:
    """Otherwise a manifest read back has another fingerprint than the recipe that wrote it."""
    made = recipe(guidance_scale=scale, guidance=GuidanceSpec(scale=int(scale), start=0, stop=1))
    back = Recipe.from_dict(made.to_dict())
    assert fingerprint(back, 0, {}) == fingerprint(made, 0, {})
    assert type(made.to_dict()["guidance_scale"]) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepps": 3}, r"unknown field 'stepps'; did you mean 'steps'\?"),
        ({"guidance": {"scal": 0.1}}, r"unknown field 'guidance\.scal'; did you mean 'scale'\?"),
        ({"cutmix": {"evry": 1}}, r"unknown field 'cutmix\.evry'; did you mean 'every'\?"),
        ({"zzz": 1}, r"unknown field 'zzz'; known: attempts, .*width"),
        ({"steps": "20"}, "steps is '20'; expected a value of type int"),
        ({"steps": 20.0}, "steps is 20.0; expected a value of type int"),
        ({"steps": True}, "steps is True; expected a value of type int"),
        ({"guidance_scale": "5"}, "guidance_scale is '5'"),
        ({"guidance": {"rederive_eps": 1}}, "guidance.rederive_eps is 1"),
        ({"guidance": 0.3}, "guidance is 0.3; expected a table"),
        ({"prompts": "a {class}"}, "prompts is 'a {class}'; expected a list of strings"),
        ({"prompts": [1]}, r"prompts is \[1\]; expected a list of strings"),
    ],
)
def test_plain_values_of_the_wrong_kind(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SynthkdError, match=message):
        Recipe.from_dict({"classes": ["a", "b"], "classes_per_group": 2, **data})


OTHER: dict[str, Any] = {
    "classes": ("cat", "dog", "fish"),
    "class_words": ("tabby", "dog", "fish"),
    "class_weights": (1, 2, 1),
    "prompts": ("{class}",),
    "sampler": "euler",
    "eta": 0.5,
    "spacing": "trailing",
    "prediction_type": "epsilon",
    "guidance_rescale": 0.7,
    "negative_prompt": "blur",
    "height": 32,
    "width": 32,
    "steps": 5,
    "guidance_scale": 3.5,
    "cfg_start": 0.2,
    "cfg_stop": 0.8,
    "previews": (0.5,),
    "guidance": GuidanceSpec(scale=0.1),
    "cutmix": MIX,
    "classes_per_group": 2,
    "samples_per_class": 3,
    "groups_per_shard": 4,
    "rounds": 2,
    "dtype": "bfloat16",
    "image_format": "jpg",
    "image_quality": 94,
    "attempts": 4,
}


def test_the_fingerprint_sees_every_field(recipe: Callable[..., Recipe]) -> None:
    seen = {fingerprint(recipe(), 0, {}), fingerprint(recipe(), 1, {}), fingerprint(recipe(), 0, {"kind": "other"})}
    assert {f.name for f in fields(Recipe)} - set(OTHER) == {"groups_per_round", "backends"}  # with rounds; none of it
    assert fingerprint(recipe(backends=("unet=onnx",)), 0, {}) == fingerprint(recipe(), 0, {})
    seen |= {fingerprint(recipe(**{name: value}), 0, {}) for name, value in OTHER.items()}
    seen.add(fingerprint(recipe(rounds=2, groups_per_round=6), 0, {}))
    assert len(seen) == 4 + len(OTHER)


@pytest.mark.parametrize(
    ("name", "base", "other"),
    [
        (
            "guidance",
            GuidanceSpec(),
            {
                "scale": 0.2,
                "schedule": "constant",
                "start": 0.1,
                "stop": 0.9,
                "every": 2,
                "gradient": "unet",
                "decoder": "tiny:x",
                "min_cosine": 0.4,
                "rederive_eps": True,
                "looks": 2,
                "look_shift": 0.2,
                "look_flip": True,
            },
        ),
        ("cutmix", MIX, {"every": 2, "last_clean": 2, "alpha": 0.5, "scope": "any"}),
    ],
)
def test_the_fingerprint_sees_every_nested_field(
    recipe: Callable[..., Recipe], name: str, base: Any, other: dict[str, Any]
) -> None:
    assert set(other) == set(asdict(base))
    changed = [replace(base, **{field: value}) for field, value in other.items()]
    seen = {fingerprint(recipe(**{name: spec}), 0, {}) for spec in [base, *changed]}
    assert len(seen) == 1 + len(other)


def test_the_fingerprint_does_not_see_the_count(synthesizer: Callable[..., Any]) -> None:
    synth = synthesizer()
    few, many = (synth.stream(Request(num_samples=n)).identity for n in (1, 10**6))
    assert few == many


def test_guided_calls() -> None:
    def calls(steps: int, **fields: Any) -> list[int]:
        return [i for i in range(steps) if GuidanceSpec(**fields).active(i, steps)]

    assert calls(5) == [0, 1, 2, 3, 4]
    assert calls(10, start=0.3, stop=0.8) == [3, 4, 5, 6, 7]
    assert calls(10, start=0.3, stop=0.8, every=2) == [3, 5, 7]
    assert calls(10, scale=0.0) == []


def test_calls_with_classifier_free_guidance(recipe: Callable[..., Recipe]) -> None:
    def calls(**fields: Any) -> list[int]:
        made = recipe(steps=10, **fields)
        return [i for i in range(10) if made.cfg_active(i)]

    assert calls() == list(range(10))
    assert calls(cfg_start=0.3, cfg_stop=0.7) == [3, 4, 5, 6]
    assert calls(cfg_start=0.5, cfg_stop=0.5) == []
    assert calls(guidance_scale=1.0) == []


def test_calls_that_previews_show(recipe: Callable[..., Recipe]) -> None:
    made = recipe(steps=20, previews=[0.2, 0.4, 0.95])
    assert [made.preview_call(p) for p in made.previews] == [3, 7, 18]
    assert recipe(steps=4, previews=(0.1,)).preview_call(0.1) == 0
    assert Recipe.from_dict({**made.to_dict(), "previews": [0.5]}).previews == (0.5,)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cfg_start": 0.8, "cfg_stop": 0.2}, "cfg_start, cfg_stop is (0.8, 0.2)"),
        ({"previews": (0.0, 0.5)}, "previews is (0.0, 0.5)"),
        ({"previews": (0.98,)}, "shares before the last of 4 calls"),
        ({"previews": (0.5, 0.501)}, "previews is (0.5, 0.501)"),
        ({"previews": ("half",)}, "previews is ['half']; expected a list of numbers"),
        ({"guidance": {"decoder": "pooled:1"}}, "guidance.decoder is 'pooled:1'"),
        ({"guidance": {"decoder": "fitted:"}}, "guidance.decoder is 'fitted:'"),
        ({"guidance": {"min_cosine": 1.0}}, "guidance.min_cosine is 1.0"),
    ],
)
def test_fields_of_cheaper_guidance_are_checked(
    recipe: Callable[..., Recipe], fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(SynthkdError) as caught:
        Recipe.from_dict({**recipe().to_dict(), **fields})
    assert says in str(caught.value)


def test_auto_is_the_vae_for_small_pictures_alone(recipe: Callable[..., Recipe]) -> None:
    assert recipe(height=64, width=64).resolved_decoder() == "vae"
    assert recipe(height=64, width=72).resolved_decoder() == "fitted"
    assert recipe(height=512, guidance=GuidanceSpec(decoder="pooled:2")).resolved_decoder() == "pooled:2"
