"""A small set on disk and a way to call the command line in this process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_job(pipeline_folder: Path, teacher_card: Path) -> Any:
    """A job on the tiny pipeline: three classes, guided, Latent CutMix on."""
    from synthkd.dfkd.job import SynthJob
    from synthkd.engine import CutMixSpec, GuidanceSpec, Recipe

    recipe = Recipe(
        classes=("cat", "dog", "bird"),
        prompts=("a photo of a {class}", "a {class}"),
        height=16,
        width=16,
        steps=4,
        guidance_scale=3.0,
        guidance=GuidanceSpec(scale=0.2),
        cutmix=CutMixSpec(every=1, last_clean=2),
        classes_per_group=3,
        samples_per_class=2,
        groups_per_shard=3,
    )
    return SynthJob(model=str(pipeline_folder), teacher=str(teacher_card), recipe=recipe)


@pytest.fixture(scope="session")
def tiny_set(tiny_job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images of the tiny job in two shards."""
    from synthkd.dfkd.rounds import draw_set
    from synthkd.engine import Request

    folder = tmp_path_factory.mktemp("set") / "shards"
    draw_set(tiny_job, Request(num_samples=30, seed=5), folder, workers=1)
    return folder


Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command in this process: exit code, standard output and error."""

    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        from synthkd.dfkd import cli

        monkeypatch.setattr(cli, "_add_plugins", lambda: None)
        monkeypatch.setattr(sys, "argv", ["synthkd", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capfd.readouterr()
        return subprocess.CompletedProcess(words, code, shown.out, shown.err)

    return run
