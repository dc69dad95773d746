"""The commands of docs/scale.md run as they stand there, on a tiny model; all ways of drawing give the same bytes."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from synthkd.dfkd.cli import app
from synthkd.engine.verify import verify_set

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text()
SECTIONS = ["Before: what will it take?", "One GPU, or one machine", "Eight GPUs without a scheduler", "Slurm",
            "A Ray cluster", "Object stores", "After"]  # fmt: skip
IMAGES = 44  # eight groups of 6, the last with 2 kept, one a shard
FOREIGN = ("pip", "ray", "scontrol", "#", "done", "if", "for", "fi")  # what is not ours to run


def _script(section: str) -> str:
    """The shell code of a section, lines joined."""
    found = re.search(rf"^## {re.escape(section)}\n.*?```sh\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, section
    return found[1].replace("\\\n", " ")


def _commands(section: str) -> Iterator[list[str]]:
    """Each synthkd command as words; one per value where a loop or an array runs it."""
    for line in _script(section).splitlines():
        words = line.split(" # ")[0].strip().removesuffix("&").split()
        while words and (words[0] == "srun" or "=" in words[0]):
            words = words[1:]
        if not words or words[0].startswith(FOREIGN):
            continue
        assert words[0] == "synthkd", line
        text = " ".join(words[1:]).replace("$SLURM_ARRAY_TASK_COUNT", "3")
        for value in range(8 if "$i" in text else 3 if "$SLURM_ARRAY_TASK_ID" in text else 1):
            yield shlex.split(text.replace("$i", str(value)).replace("$SLURM_ARRAY_TASK_ID", str(value)))


@pytest.fixture
def small(
    pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Any], tmp_path: Path
) -> Callable[[list[str]], list[str]]:
    """A command at a small size: the tiny model in place of the preset, few images, a store in a folder."""
    fields = {k: v for k, v in recipe(groups_per_shard=1).to_dict().items() if not isinstance(v, dict)}
    text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in fields.items())
    (tmp_path / "recipe.toml").write_text(f"{text}[guidance]\nscale = 0.1\n")
    tiny = ["--model", str(pipeline_folder), "--teacher", str(teacher_card), "--recipe", str(tmp_path / "recipe.toml")]

    def make(words: list[str]) -> list[str]:
        out: list[str] = []
        for before, word in zip(["", *words], words, strict=False):
            if word == "--preset" or before == "--preset":
                out += tiny if word == "--preset" else []
            elif before == "--num-samples" and words[0] == "synth":
                out.append(str(IMAGES))
            elif before == "--workers":
                out.append(str(min(int(word), 2)))
            else:
                out.append(word.replace("s3://bucket", f"file://{tmp_path}/store"))
        if out[0] != "synth":
            return out
        return [*out, "--device", "cpu", *(() if "--workers" in out else ("--workers", "1"))]

    return make


def _run(words: list[str]) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the set of one machine is kept for the tests that come after."""
    return tmp_path_factory.mktemp("kept") / "million"


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def test_the_page_has_these_sections() -> None:
    assert [s for s in re.findall(r"^## (.*)", PAGE, re.MULTILINE) if s in SECTIONS] == SECTIONS
    assert all(list(_commands(section)) for section in SECTIONS)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s != "A Ray cluster"])
def test_its_commands_run(
    section: str, small: Callable[..., list[str]], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page, each in a folder of its own; every way of drawing ends in the set of one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if section == "After":
        shutil.copytree(_set_of_one(small, kept), tmp_path / "sets/million")
    told = [_run(small(words)) for words in _commands(section)]
    if section.startswith("Before"):
        assert "1,000,000,000 images on 1,024 processes" in told[-1]
        return
    drawn = tmp_path / "sets/million"
    assert _tars(drawn) == _tars(_set_of_one(small, kept))
    assert verify_set(drawn).problems == ()
    assert {"index.jsonl", "index.parquet", "README.md"} <= {p.name for p in drawn.iterdir()}
    assert not list(drawn.glob("index-*"))
    if section == "After":
        assert len(list((tmp_path / "folders/million").rglob("*.png"))) == IMAGES
        assert (tmp_path / "stats.html").stat().st_size > 10_000


def _set_of_one(small: Callable[..., list[str]], kept: Path) -> Path:
    """The set of one process, drawn once."""
    if not kept.exists():
        words = small(next(_commands("One GPU, or one machine")))
        _run([str(kept) if word == "sets/million" else word for word in words])
    return kept


def test_ray_commands_are_known() -> None:
    """They run on a cluster in test_ray.py; here: their options exist."""
    known = _run(["synth", "--help"])
    for words in _commands("A Ray cluster"):
        assert all(word[:20] in known for word in words if word.startswith("--"))
