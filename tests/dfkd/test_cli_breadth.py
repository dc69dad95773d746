"""The command line over what a job can be: rounds, targets, samplers, LoRAs, other priors; and their wrong uses."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

RECIPE = (
    "height = 16\nwidth = 16\nsteps = 3\nclasses_per_group = {per_group}\ngroups_per_shard = 1\n{more}\n"
    "[guidance]\nscale = 0.2\n"
)


@pytest.fixture
def synth(call: Any, teacher_card: Path, pipeline_folders: Mapping[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """`synthkd synth` on a tiny pipeline."""

    def run(*words: object, model: str = "sd1", count: int = 6, more: str = "", per_group: int = 3) -> Any:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(RECIPE.format(more=more, per_group=per_group))
        return call(
            "synth", "--model", pipeline_folders[model], "--teacher", teacher_card, "--recipe", recipe,
            "--out", tmp_path / "set", "--num-samples", count, "--workers", 1, *words,
        )  # fmt: skip

    return run


def labels(folder: Path) -> Counter[str]:
    """Class names in a set."""
    found: Counter[str] = Counter()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    found[json.load(tar.extractfile(info))["class"]] += 1  # type: ignore[arg-type]
    return found


def test_rounds_replay_and_verify(call: Any, synth: Callable[..., Any], tmp_path: Path) -> None:
    done = synth("--gamma", 1, "--rounds", 2, "--divergence", "js", count=12)
    assert done.returncode == 0, done.stderr
    assert "student of round 1" in done.stdout
    assert call("verify", tmp_path / "set").returncode == 0
    again = call("replay", tmp_path / "set", "--id", 9, "--out", tmp_path / "9.png")
    assert "identical to the stored image" in again.stdout
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["guidance"]["divergence"] == "js"
    assert manifest["source"]["round_student"]["arch"] == "resnet"


def test_an_unknown_divergence(synth: Callable[..., Any]) -> None:
    done = synth("--gamma", 1, "--rounds", 2, "--divergence", "kj", count=12)
    assert done.returncode == 2
    assert done.stderr.strip() == "synthkd: guidance: divergence is 'kj'; did you mean 'kl'? known: js, kl"


def test_targets(synth: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "targets.toml").write_text("[cat]\nweight = 2\n[bird]\nexclude = true\n")
    done = synth("--targets", tmp_path / "targets.toml", count=12)
    assert done.returncode == 0, done.stderr
    assert labels(tmp_path / "set") == {"cat": 8, "dog": 4}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler", "euler_ancestral", "lcm"])
def test_samplers(call: Any, synth: Callable[..., Any], tmp_path: Path, sampler: str) -> None:
    done = synth(more=f'sampler = "{sampler}"')
    assert done.returncode == 0, done.stderr
    assert "identical" in call("replay", tmp_path / "set", "--id", 4, "--out", tmp_path / "4.png").stdout


@pytest.mark.parametrize("model", ["sd2", "sdxl", "dit"])
def test_priors(call: Any, synth: Callable[..., Any], tmp_path: Path, model: str) -> None:
    done = synth(model=model, more='prompts = ["{class}"]')
    assert done.returncode == 0, done.stderr
    assert call("verify", tmp_path / "set").returncode == 0
    assert "identical" in call("replay", tmp_path / "set", "--id", 2, "--out", tmp_path / "2.png").stdout


@pytest.mark.parametrize(
    ("words", "more", "parts"),
    [
        (("--gamma", 1), "", ("gamma is 1.0, but rounds is 1",)),
        (("--rounds", 3), "", ("rounds is 3, but gamma is 0",)),
        (("--rounds", 0), "", ("rounds is 0",)),
        (("--targets", "none.toml"), "", ("--targets none.toml: cannot be read",)),
        ((), 'sampler = "dpmpp"', ("did you mean 'dpmpp_2m'",)),
        ((), 'sampler = "dpmpp_2m"\nsteps = 1', ("not valid TOML",)),
        ((), 'spacing = "karras"', ("spacing is 'karras'",)),
        ((), "eta = 2", ("eta is 2.0",)),
        ((), 'class_weights = ["1"]', ("class_weights is ['1']; expected a list of whole numbers",)),
        ((), 'prediction_type = "v_prediction"', ("the prior's scheduler says 'epsilon'",)),
        (("--lora", "none.safetensors"), "", ("lora 'none.safetensors'",)),
    ],
)
def test_wrong_uses_are_one_line(
    synth: Callable[..., Any], tmp_path: Path, words: tuple[object, ...], more: str, parts: tuple[str, ...]
) -> None:
    done = synth(*words, more=more)
    assert done.returncode == 2, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("synthkd: ")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]
    assert not list((tmp_path / "set").glob("shard*"))
