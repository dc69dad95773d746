"""Every wrong input: one clear line on standard error, exit code 2, nothing lost."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


def assert_refused(done: Any, *parts: str, code: int = 2) -> None:
    """Exit code, a last line that is ours, and what it must say."""
    lines = [line for line in done.stderr.strip().split("\n") if line.startswith("synthkd: ")]
    assert done.returncode == code, (done.stdout, done.stderr)
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture
def card(teacher_card: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher to damage."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_card.parent, folder)
    return folder / "teacher.toml"


def synth(call: Any, model: object, card: Path, out: Path, *more: object) -> Any:
    """`synthkd synth` on the tiny pipeline."""
    recipe = out.parent / "recipe.toml"
    text = "height = 16\nwidth = 16\nsteps = 3\nclasses_per_group = 3\n[guidance]\nscale = 0.1\n"
    recipe.write_text(text)
    words = ("--model", model, "--teacher", card, "--recipe", recipe, "--out", out, "--workers", 1)
    return call("synth", *words, "--num-samples", 6, *more)


def test_the_same_words_without_damage_succeed(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """The control of every test below."""
    done = synth(call, pipeline_folder, card, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "6 images, 6 drawn now" in done.stdout


def test_teacher_output_count_against_its_card(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """The weights have three outputs, the card names four classes."""
    card.write_text(card.read_text().replace('"bird"]', '"bird", "fish"]'))
    done = synth(call, pipeline_folder, card, tmp_path / "out")
    assert_refused(done, "has 3 outputs, the card names 4 classes")


def test_teacher_output_count_against_the_classes(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """A classes file of another length is refused before any weight is read."""
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    recipe = tmp_path / "two.toml"
    recipe.write_text("classes_per_group = 2\nheight = 16\nwidth = 16\n")
    card.with_name("teacher.safetensors").write_bytes(b"not read")
    done = call(
        "synth", "--model", "/nowhere", "--teacher", card, "--classes", tmp_path / "classes.txt",
        "--recipe", recipe, "--out", tmp_path / "o",
    )  # fmt: skip
    assert_refused(done, "has 3 outputs, the recipe names 2 classes")


def test_missing_weights(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """The card's weights file is not there."""
    card.with_name("teacher.safetensors").unlink()
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out"), "weights", "not found")


def test_wrong_shaped_weights(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """A tensor of another shape is named with both shapes."""
    path = card.with_name("teacher.safetensors")
    state = load_file(path)
    state["conv1.weight"] = torch.zeros(8, 3, 5, 5)
    save_file(state, path)
    done = synth(call, pipeline_folder, card, tmp_path / "out")
    assert_refused(done, "'conv1.weight' has shape (8, 3, 5, 5)", "expects (8, 3, 3, 3)")


def test_missing_tensor(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """A tensor that is not there is named."""
    path = card.with_name("teacher.safetensors")
    state = {name: value for name, value in load_file(path).items() if name != "bn1.weight"}
    save_file(state, path)
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out"), "'bn1.weight' is missing")


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        """path: the file it would write."""
        self.path = path

    def __reduce__(self) -> Any:
        """What a hostile pickle does."""
        return (Path.touch, (self.path,))


def test_pickle_that_runs_code_is_refused(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """The message says why, and the code did not run."""
    evil = card.with_name("evil.pth")
    torch.save({"state_dict": Bomb(tmp_path / "pwned")}, evil)
    card.write_text(card.read_text().replace("teacher.safetensors", "evil.pth"))
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out"), "refused", "could run code")
    assert not (tmp_path / "pwned").exists()


def test_bare_pickle_is_refused(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """Also one that torch did not write."""
    card.with_name("evil.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "pwned")))
    card.write_text(card.read_text().replace("teacher.safetensors", "evil.pth"))
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out"), "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('arch = "resnet"', 'arch = "resent"', ("'resent' is unknown", "did you mean 'resnet'")),
        ("input_size", "inputsize", ("unknown field 'inputsize'", "did you mean 'input_size'")),
        ("[16, 16]", '"16"', ("input_size is '16'", "[height, width]")),
        ("blocks = [1, 1]", "blocks = [1]", ("arch_args do not fit",)),
        ("std = [0.25, 0.25, 0.25]", "std = [0.25, 0, 0.25]", ("std is", "above 0")),
        ('arch = "resnet"', "arch = ", ("not valid TOML",)),
    ],
)
def test_wrong_cards(
    call: Any, pipeline_folder: Path, card: Path, tmp_path: Path, old: str, new: str, parts: tuple[str, ...]
) -> None:
    """Each wrong field of a card is named."""
    card.write_text(card.read_text().replace(old, new))
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out"), *parts)


def test_corrupt_shard(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """A flipped bit: `distill` names it and leaves the image out, a strict one stops, and `verify` names it."""
    broken = tmp_path / "set"
    shutil.copytree(tiny_set, broken)
    shard = broken / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    done = call("distill", broken, "--out", tmp_path / "s", "--steps", 4, "--batch-size", 8, "--strict")
    assert_refused(done, "shard-000000.tar", "000000000.png", "does not match its digest")
    done = call("distill", broken, "--out", tmp_path / "s", "--steps", 4, "--batch-size", 8)
    assert done.returncode == 0, done.stderr
    assert "1 damaged images skipped (000000000)" in done.stdout
    assert "000000000.png does not match its digest" in done.stderr
    assert list(json.loads((tmp_path / "s/training.json").read_text())["damaged"]) == ["000000000"]
    done = call("verify", broken)
    assert_refused(done, "1 problems in 2 shards")
    assert "000000000.png does not match its digest" in done.stderr


def test_truncated_shard(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """A truncated tar is refused by `distill` and named by `verify`."""
    broken = tmp_path / "set"
    shutil.copytree(tiny_set, broken)
    shard = broken / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert_refused(call("distill", broken, "--out", tmp_path / "s", "--steps", 2), "shard-000001.tar")
    done = call("verify", broken)
    assert_refused(done, "problems")
    assert "shard-000001.tar: truncated to 5000 of" in done.stderr


def test_another_recipes_set(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """The folder is left as it is, and the first difference is named."""
    assert synth(call, pipeline_folder, card, tmp_path / "out").returncode == 0

    def files() -> dict[Path, bytes]:
        found = (p for p in (tmp_path / "out").rglob("*") if p.is_file() and not p.name.startswith(".lock"))
        return {p: p.read_bytes() for p in found}

    before = files()
    done = synth(call, pipeline_folder, card, tmp_path / "out", "--scale", 0.25)
    assert_refused(done, "holds another recipe's set", "recipe.guidance.scale is 0.1 there, 0.25 here")
    assert before == files()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("run", "digits", "--num-images", 0), ("num_samples is 0", ">= 1")),
        (("run", "digits", "--num-images", 5, "--workers", 0), ("--workers is 0", ">= 1")),
        (("run", "digits", "--seed", -1), ("seed is -1",)),
        (("run", "digits", "--steps", 0), ("steps is 0",)),
        (("run", "digits", "--grace", 0), ("--grace is 0", "seconds above 0")),
        (("run", "digits", "--method", "pool", "--deadline", 5), ("--deadline is for groups of a diffusion prior",)),
        (("run", "digit"), ("preset 'digit' is unknown", "did you mean 'digits'")),
        (("run", "digits", "--device", "cpx"), ("did you mean 'cpu'",)),
        (("synth", "--preset", "digits", "--num-samples", 0), ("num_samples is 0",)),
        (("synth", "--num-samples", 5), ("--model and --teacher",)),
        (("synth", "--model", "embedded:digit", "--teacher", "embedded:digits"), ("did you mean 'digits'",)),
        (("synth", "--preset", "digits", "--shards", "9"), ("expected distinct numbers from 0 to",)),
        (("synth", "--preset", "digits", "--recipe", "/no/such.toml"), ("cannot be read",)),
        (("synth", "--preset", "digits", "--alpha", -1), ("alpha is -1.0", ">= 0")),
    ],
)
def test_wrong_options(call: Any, tmp_path: Path, words: tuple[object, ...], parts: tuple[str, ...]) -> None:
    """Counts below one, unknown names, missing parts."""
    done = call(*words, "--out", tmp_path / "out")
    assert_refused(done, *parts)
    assert not (tmp_path / "out" / "shards").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stepz = 5", ("unknown field 'stepz'", "did you mean 'steps'")),
        ("steps = 'many'", ("steps is 'many'", "type int")),
        ("[guidance]\ngradient = 'x'", ("guidance.gradient is 'x'", "did you mean 'x0'")),
        ("samples_per_class = 1\n[cutmix]\nevery = 2", ("samples_per_class is 1", "at least 2")),
        ("prompts = ['a photo']", ("contains {class}",)),
        ("guidance = 3", ("guidance is 3", "table")),
        ("height = 33", ("height is 33", "multiple of 4")),
    ],
)
def test_wrong_recipes(call: Any, tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    """Each wrong field of a recipe file is named."""
    (tmp_path / "recipe.toml").write_text(text)
    done = call("synth", "--preset", "digits", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "out")
    assert_refused(done, *parts)


def test_no_space_left(
    call: Any, pipeline_folder: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: one line; what was finished stays, and the same command completes the set."""
    import errno
    import os

    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    done = synth(call, pipeline_folder, card, tmp_path / "out", "--num-samples", 18)
    assert_refused(done, "no space left", "run the same command again")
    monkeypatch.setattr(os, "fsync", real)
    done = synth(call, pipeline_folder, card, tmp_path / "out", "--num-samples", 18)
    assert done.returncode == 0, done.stderr
    assert call("verify", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("command", ["verify", "report", "distill"])
def test_folder_that_is_no_set(call: Any, tmp_path: Path, command: str) -> None:
    """A folder of something else is refused."""
    more = ("--out", tmp_path / "o", "--teacher", "embedded:digits") if command == "distill" else ()
    assert_refused(call(command, tmp_path, *more), "manifest.json")


@pytest.mark.parametrize("fuse", ["decoder", "off"])
def test_fuse_is_taken_on_a_cpu_too(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path, fuse: str) -> None:
    """The environment key says what was fused; the fingerprint does not know."""
    done = synth(call, pipeline_folder, card, tmp_path / "out", "--fuse", fuse)
    assert done.returncode == 0, done.stderr
    from synthkd.engine.index import read_environments

    (environment,) = read_environments(tmp_path / "out").values()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    wanted = "eager, fused decoder" if fuse == "decoder" else "eager"
    assert environment["backend"] == wanted
    assert "fuse" not in {**manifest["recipe"], **manifest["source"]}
    again = call("replay", tmp_path / "out", "--id", 3, "--out", tmp_path / "3.png", "--device", "cpu")
    assert "identical to the stored image" in again.stdout  # fused or not as the set was
    other = call("replay", tmp_path / "out", "--id", 3, "--out", tmp_path / "3.png", "--fuse", "decodr")
    assert_refused(other, "fuse 'decodr'", "'decoder'")


def test_unknown_fuse(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """Refused before a weight is read; nothing is written."""
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out", "--fuse", "decodr"), "fuse", "'decoder'")
    assert not (tmp_path / "out").exists()


def test_replay_of_an_id_outside(call: Any, tiny_set: Path) -> None:
    """The range of ids is named."""
    assert_refused(call("replay", tiny_set, "--id", 30), "samples 0 to 29")


def test_manifest_that_is_not_ours(call: Any, tmp_path: Path) -> None:
    """JSON of another kind, and no JSON at all."""
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 7}))
    assert_refused(call("verify", tmp_path), "format 7")
    (tmp_path / "manifest.json").write_text("{")
    assert_refused(call("verify", tmp_path), "not a synthkd manifest")


def test_data_that_does_not_fit(call: Any, teacher_card: Path, tmp_path: Path) -> None:
    """Unknown parts, empty folders and labels outside the classes."""
    import numpy as np

    assert_refused(call("evaluate", teacher_card, "--data", "digits:tset"), "did you mean 'test'")
    assert_refused(call("evaluate", teacher_card, "--data", tmp_path), "no images in sub-folders")
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 16, 16, 3), np.uint8), y=np.array([0, 7]))
    assert_refused(call("evaluate", teacher_card, "--data", tmp_path / "x.npz"), "labels 0..7", "3 classes")


def test_card_whose_network_takes_other_images(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """A grey network: said at loading, not at the first step."""
    from synthkd.dfkd.nets import build_net

    args = {"widths": [8, 12], "blocks": [1, 1], "in_channels": 1}
    save_file(build_net("resnet", 3, args).state_dict(), card.with_name("teacher.safetensors"))
    card.write_text(card.read_text() + "in_channels = 1\n")
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out"), "does not take 3x16x16 images")


@pytest.mark.parametrize("keep", [0, 3, 40, 700, 5000])
def test_damaged_torch_file(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path, keep: int) -> None:
    """A truncated .pth is one line, wherever it breaks."""
    torch.save({"a": torch.zeros(2000)}, card.with_name("t.pth"))
    whole = card.with_name("t.pth").read_bytes()
    card.with_name("t.pth").write_bytes(whole[:keep])
    card.write_text(card.read_text().replace("teacher.safetensors", "t.pth"))
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out"), "t.pth")


def test_output_that_cannot_be_written(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """A file where a folder is wanted, a folder that is not there: one line."""
    (tmp_path / "file").write_text("")
    assert_refused(call("distill", tiny_set, "--out", tmp_path / "file", "--steps", 2, "--batch-size", 4), "file")
    assert_refused(call("replay", tiny_set, "--id", 0, "--out", tmp_path / "no" / "x.png"), "x.png")


def test_unfinished_set_is_not_distilled(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """A set whose last shard is missing says how many images there are."""
    part = tmp_path / "set"
    shutil.copytree(tiny_set, part)
    (part / "shard-000001.tar").unlink()
    assert_refused(call("distill", part, "--out", tmp_path / "s", "--steps", 2), "18 of 30 images")
    done = call("distill", part, "--out", tmp_path / "s", "--steps", 2, "--batch-size", 4, "--limit", 18)
    assert done.returncode == 0, done.stderr


def test_a_run_is_not_its_set(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """`verify` on a run's folder names the set inside."""
    shutil.copytree(tiny_set, tmp_path / "shards")
    assert_refused(call("verify", tmp_path), f"its set is {tmp_path / 'shards'}")


def test_training_settings_from_a_file(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """A spec file chooses the student; unknown fields and wrong types are named."""
    spec = tmp_path / "spec.toml"
    words = ("distill", tiny_set, "--out", tmp_path / "s", "--spec", spec)
    spec.write_text("stepz = 3")
    assert_refused(call(*words), "unknown field 'stepz'", "did you mean 'steps'")
    spec.write_text("steps = 'x'")
    assert_refused(call(*words), f"--spec {spec}: steps is 'x'; expected a whole number >= 1")
    spec.write_text("steps = 2\nbatch_size = 4\n[arch_args]\nwidths = [4]\nblocks = [1]")
    assert call(*words).returncode == 0
    assert '"widths" = [4]' in (tmp_path / "s/student.toml").read_text()


def test_damaged_shard_is_drawn_again(call: Any, pipeline_folder: Path, card: Path, tmp_path: Path) -> None:
    """A truncated shard: the command that drew the set mends it, byte for byte."""
    out = tmp_path / "out"
    assert synth(call, pipeline_folder, card, out, "--num-samples", 12).returncode == 0
    shard = out / "shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:3000])
    assert call("verify", out).returncode == 2
    assert synth(call, pipeline_folder, card, out, "--num-samples", 12).returncode == 0
    assert shard.read_bytes() == whole
    assert call("verify", out).returncode == 0


@pytest.mark.parametrize(
    ("shape", "part"), [((4, 3, 16, 16), "expected uint8"), ((4, 16, 16, 1), "expected uint8"), (None, "x and y")]
)
def test_wrong_arrays(call: Any, teacher_card: Path, tmp_path: Path, shape: Any, part: str) -> None:
    """Channels first, one channel, a truncated file."""
    import numpy as np

    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros(shape or (4, 16, 16, 3), np.uint8), y=np.zeros(4, np.int64))
    if shape is None:
        path.write_bytes(path.read_bytes()[:900])
    assert_refused(call("evaluate", teacher_card, "--data", path), part)


def test_misspelt_class_folder(call: Any, teacher_card: Path, tmp_path: Path) -> None:
    """A class without a folder is not passed over."""
    for name in ("cat", "dgo", "bird"):
        (tmp_path / name).mkdir()
    assert_refused(call("evaluate", teacher_card, "--data", tmp_path), "no folder for class 'dog'")
    assert_refused(call("evaluate", teacher_card, "--data", "digits:test"), "has 10 classes, the network 3")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--alpha", 0, "--beta", 0), "all weights are 0"),
        (("--recipe",), "a window that holds at least one of 10 steps"),
    ],
)
def test_guidance_that_never_guides(
    call: Any, pipeline_folder: Path, card: Path, tmp_path: Path, more: tuple[Any, ...], part: str
) -> None:
    """A no-op is an error."""
    narrow = tmp_path / "narrow.toml"
    narrow.write_text(
        "height = 16\nwidth = 16\nsteps = 10\nclasses_per_group = 3\n"
        "[guidance]\nscale = 0.1\nstart = 0.5\nstop = 0.54\n"
    )
    more = (*more, narrow) if more == ("--recipe",) else more
    assert_refused(synth(call, pipeline_folder, card, tmp_path / "out", *more), part)
