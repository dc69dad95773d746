"""Who has seen the teacher's data neither draws nor teaches: cards, pools, sets, and each command that uses them."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkd.bench.cifar_pack import read_packed
from synthkd.dfkd import apart, presets
from synthkd.dfkd.cards import read_card
from synthkd.dfkd.data import labelled_arrays
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.method_run import MethodRun
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.prior_data import load_captioned
from synthkd.dfkd.rounds import draw_set
from synthkd.engine import GuidanceSpec, Request, SynthkdError
from synthkd.engine.declared import DECLARATION, OverlapError, read_declaration, write_declaration
from synthkd.engine.index import claim_folder

Card = Callable[[str], Path]


@pytest.fixture
def card(teacher_card: Path, tmp_path: Path) -> Card:
    """`card(about)`: the tiny teacher's, with a table `about` of these lines."""

    def make(about: str) -> Path:
        shutil.copy(teacher_card.with_name("teacher.safetensors"), tmp_path)
        path = tmp_path / "card.toml"
        path.write_text(f"{teacher_card.read_text()}[about]\n{about}\n")
        return path

    return make


@pytest.fixture
def prior(pipeline_folder: Path, tmp_path: Path) -> Path:
    """The tiny pipeline, by links, in a folder of its own that may declare."""
    folder = tmp_path / "prior"
    folder.mkdir()
    for path in pipeline_folder.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def leak(prior: Path, card: Card, tiny_job: SynthJob, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """The preset `leak`: its prior has seen Tiny Images, its teacher CIFAR-10, which is of them."""
    write_declaration(prior, ["tiny-images"], "")
    job = replace(tiny_job, model=str(prior), teacher=str(card('trained_on = ["cifar10/train"]')))
    made = Preset(name="leak", job=job, num_images=6, compared=("pool", "diffdfkd"))
    monkeypatch.setattr(presets, "leak", lambda: made, raising=False)
    monkeypatch.setitem(presets._OWN, "leak", "synthkd.dfkd.presets:leak")
    return made


def pool(path: Path, *names: str) -> str:
    """An .npz of four images that declares names of data sets."""
    x = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(path, x=x, **({"trained_on": np.array(names)} if names else {}))
    return str(path)


@pytest.mark.parametrize(
    ("about", "names"),
    [
        ("", None),
        ('trained_on = ["cifar10/train", "svhn"]', ("cifar10/train", "svhn")),
        ('trained_on = "cifar10/train"', ("cifar10/train",)),
        ('trained_on = "1,000 photos of a camera"', None),
        ('teacher_trained_on = ["cifar10/train"]', ("cifar10/train",)),
        ('trained_on = ["glyphs"]\nteacher_trained_on = ["glyphs", "svhn"]', ("glyphs", "svhn")),
    ],
)
def test_what_a_card_declares(card: Card, about: str, names: Any) -> None:
    """A list, or one name; sentences of older cards are for readers and declare nothing."""
    assert read_card(card(about)).trained_on == names


@pytest.mark.parametrize(
    "value", ["3", "[]", "[1]", '["CIFAR-10"]', '"CIFAR-10"', '"unknown"', '""', "{a = 1}", "[nan]", "true"]
)
@pytest.mark.parametrize("field", ["trained_on", "teacher_trained_on"])
def test_a_card_that_declares_no_names(card: Card, field: str, value: str) -> None:
    """Refused when it is read, by its field."""
    with pytest.raises(SynthkdError, match=rf"^teacher card .*: about\.{field} "):
        read_card(card(f"{field} = {value}"))


def test_what_comes_with_the_package() -> None:
    """Teacher, judge and prior of digits declare, and are apart."""
    assert apart.card_declares("embedded:digits") == apart.card_declares("embedded:segments") == ("digits/train",)
    assert apart.card_declares("embedded:digits/judge") == ("digits/train", "glyphs")
    assert apart.model_declares("embedded:digits") == ("glyphs",)
    assert apart.pool_declares("embedded:digits/pool") == apart.pool_declares("segments:pool") == ("letters",)
    assert presets.load_preset("digits").job.trained_on() == {"teacher": "digits/train", "prior": "glyphs"}


def test_what_a_pool_declares(tmp_path: Path) -> None:
    """An .npz by its array; a folder, and a tar in it, by its file; others nothing."""
    assert apart.pool_declares(pool(tmp_path / "a.npz", "pacs/art", "pacs/photo")) == ("pacs/art", "pacs/photo")
    assert apart.pool_declares(pool(tmp_path / "b.npz")) is None
    assert apart.pool_declares(str(tmp_path)) is apart.pool_declares("nowhere") is None
    write_declaration(tmp_path, ["svhn"], "")
    assert apart.pool_declares(str(tmp_path)) == apart.pool_declares(str(tmp_path / "x.tar")) == ("svhn",)


def _npy(array: Any, shape: str = "") -> bytes:
    """A .npy file; shape: in place of the true one, of as many characters."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue().replace(str(array.shape).encode(), shape.encode()) if shape else file.getvalue()


HOSTILE = {
    "pickle": _npy(np.array([print, "cifar10"], object)),
    "claims more": _npy(np.array(["a"] * 100_000), "(999999,)"),
    "numbers": _npy(np.array([1, 2])),
    "bytes": _npy(np.array([b"cifar10"])),
    "a text": _npy(np.array("cifar10")),
    "cut": _npy(np.array(["cifar10"]))[:-3],
    "empty": b"",
    "no names": _npy(np.array(["Some Images"])),
    "none": _npy(np.array([], "U4")),
    "a bomb": b"\0" * 2**24,
}


@pytest.mark.parametrize("kind", [*HOSTILE, "no zip", "pipe", "encrypted", "unknown packing"])
def test_a_pool_by_a_stranger(tmp_path: Path, kind: str) -> None:
    """One line, no pickle is opened, and nothing is unpacked beyond a bound."""
    path = tmp_path / "pool.npz"
    if kind == "pipe":
        os.mkfifo(path)
        assert apart.pool_declares(str(path)) is None  # `open_images` says that it is no file
        return
    path.write_bytes(b"no zip at all")
    if kind != "no zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("trained_on.npy", HOSTILE.get(kind, HOSTILE["numbers"]))
    if kind in ("encrypted", "unknown packing"):
        path.write_bytes(spoilt(path.read_bytes(), kind))
    with pytest.raises(SynthkdError, match=r"^pool .*pool\.npz: trained_on ") as refused:
        apart.pool_declares(str(path))
    assert "\n" not in str(refused.value)


def spoilt(data: bytes, kind: str) -> bytes:
    """A zip whose members claim to be encrypted, or packed as nobody packs."""
    offset, value = (6, b"\1\0") if kind == "encrypted" else (8, b"\x63\0")
    out = bytearray(data)
    for mark, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):  # each member's own head, and the list of all
        at = out.find(mark)
        while at >= 0:
            out[at + offset + shift : at + offset + shift + 2] = value
            at = out.find(mark, at + 4)
    return bytes(out)


@pytest.mark.parametrize("kind", ["encrypted", "unknown packing", "giant", "bomb"])
@pytest.mark.parametrize("read", [load_captioned, labelled_arrays, read_packed])
def test_arrays_by_a_stranger(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    """Each reader of an .npz: one line, whatever zipfile and numpy stumble over."""
    path, x = tmp_path / "pool.npz", np.zeros((4, 8, 8, 3), np.uint8)
    with zipfile.ZipFile(path, "w") as file:
        for name in ("x", "y", "captions", "trained_on", "blob", "shape"):
            file.writestr(f"{name}.npy", _npy(x, "(999999999,)" if kind == "giant" else ""))
    data = path.read_bytes()
    if kind == "bomb":  # the list of all says that x unpacks to 4 GB
        at = data.index(b"PK\1\2")
        data = data[: at + 24] + b"\xf0\xff\xff\xff" + data[at + 28 :]
    path.write_bytes(spoilt(data, kind) if kind in ("encrypted", "unknown packing") else data)
    with pytest.raises(SynthkdError) as refused:
        read(path)
    assert "\n" not in str(refused.value)
    if read is load_captioned:  # before anything is unpacked
        bounds = {"giant": "x.npy claims 999999999 bytes and holds", "bomb": "bytes of arrays; at most 2147483648 are"}
        assert bounds.get(kind, "") in str(refused.value)


def claimed(folder: Path, job: SynthJob, source: dict[str, Any]) -> None:
    """The manifest of a set without images."""
    told = {"recipe": job.recipe.to_dict(), "seed": 0, "guidance": {}, "fingerprint": "", "model_sha256": ""}
    claim_folder(folder, told, 6, source)


def test_a_set_of_many_networks(tmp_path: Path, leak: Preset) -> None:
    """What a LoRA and a tiny decoder declare stands in the manifest, refuses the set, and is what the set has shown."""
    out = tmp_path / "set"
    (Path(leak.job.model) / DECLARATION).unlink()
    for name, seen in (("lora", "cinic10"), ("tiny", "svhn")):
        (tmp_path / name).mkdir()
        write_declaration(tmp_path / name, [seen], "")
    look = replace(leak.job.recipe, guidance=GuidanceSpec(scale=0.2, decoder=f"tiny:{tmp_path / 'tiny'}"))
    job = replace(leak.job, loras=(str(tmp_path / "lora"),), recipe=look)
    claimed(out, job, job.origin())
    told = json.loads((out / "manifest.json").read_text())["source"]["declared"]
    assert told == {"teacher": "cifar10/train", "prior": "not declared", "lora": "cinic10", "decoder": "svhn"}
    assert set(apart.pool_declares(str(out)) or ()) == {"cinic10", "svhn"}
    assert apart.pool_declares(str(out / "shard-000000.tar")) == apart.pool_declares(str(out))
    with pytest.raises(OverlapError, match=r"^the lora of the set .*'cinic10'"):
        apart.check_set(out, leak.job.teacher)


def test_an_older_set_is_asked_by_its_prior(tmp_path: Path, leak: Preset) -> None:
    """Its manifest names the prior and says nothing of data."""
    claimed(tmp_path / "set", leak.job, leak.job.source())
    with pytest.raises(OverlapError, match=r"^the prior of the set .*'tiny-images'"):
        apart.check_set(tmp_path / "set", leak.job.teacher)


def test_what_is_handed_down(tmp_path: Path) -> None:
    """All names that are declared, whoever else says nothing; no older word where nobody declares."""
    apart.hand_down(tmp_path, ("glyphs",), ("svhn", "glyphs"))
    assert read_declaration(tmp_path) == ("glyphs", "svhn")
    apart.hand_down(tmp_path, ("glyphs",), None)
    assert read_declaration(tmp_path) == ("glyphs",)
    apart.hand_down(tmp_path, None)
    assert not (tmp_path / DECLARATION).exists()


def test_a_method_answers_for_what_it_uses(leak: Preset, tmp_path: Path) -> None:
    """The prior for what draws with it, the pool for what opens it, both for what is not of this package."""
    seen = pool(tmp_path / "pool.npz", "cifar10")

    def refused(method: str, of: str | None) -> bool:
        try:
            MethodRun(preset=leak, method=method, out=tmp_path / "out", pool=of).check_apart()
        except OverlapError:
            return True
        return False

    assert [refused(name, None) for name in ("diffdfkd", "diffusion", "dda", "theirs")] == [True] * 4
    assert [refused(name, None) for name in ("pool", "mosaickd", "fastdfkd", "deepinversion")] == [False] * 4
    (Path(leak.job.model) / DECLARATION).unlink()
    assert [refused(name, seen) for name in ("pool", "mosaickd", "dda", "theirs")] == [True] * 4
    assert [refused(name, seen) for name in ("diffdfkd", "diffusion", "fastdfkd", "deepinversion")] == [False] * 4


COMMANDS = {
    "run": ("run", "leak"),
    "run a method": ("run", "leak", "--method", "diffdfkd"),
    "compare": ("compare", "leak"),
    "synth": ("synth", "--preset", "leak", "--num-samples", "6"),
    "online": ("online", "--preset", "leak", "--num-samples", "12", "--steps", "1"),
    "fit-decoder": ("fit-decoder", "--preset", "leak"),
    "fit-patches": ("fit-patches", "--preset", "leak"),
    "plan": ("plan", "--preset", "leak"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_refuses_the_prior(
    call: Any, leak: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Exit code 2, one line, nothing loaded, nothing written."""
    monkeypatch.setattr("synthkd.dfkd.teachers.load_weights", _never)
    out = () if name == "plan" else ("--out", tmp_path / "out")
    done = call(*COMMANDS[name], *out)
    _is_refused(done, leak.job.model, "tiny-images")
    assert not (tmp_path / "out").exists()


def _never(*_: object) -> Any:
    raise AssertionError("weights were read")


def _is_refused(done: Any, who: str, seen: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("synthkd: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    for part in (who, repr(seen), "'cifar10/train'", "not data-free"):
        assert part in lines[0]


@pytest.mark.parametrize("words", [("run", "leak", "--method", "pool"), ("compare", "leak"), ("fit-patches",)])
def test_each_command_refuses_the_pool(
    call: Any, leak: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """As the prior, which has seen nothing here."""
    monkeypatch.setattr("synthkd.dfkd.teachers.load_weights", _never)
    (Path(leak.job.model) / DECLARATION).unlink()
    words = (*words, "--preset", "leak") if words == ("fit-patches",) else words
    seen = pool(tmp_path / "pool.npz", "cifar10/test")
    _is_refused(call(*words, "--pool", seen, "--out", tmp_path / "out"), seen, "cifar10/test")
    assert not (tmp_path / "out").exists()


def test_what_is_fused_or_looked_through_declares_too(leak: Preset, tmp_path: Path) -> None:
    """LoRAs, patches and fitted decoders, by the folder they lie in."""
    (Path(leak.job.model) / DECLARATION).unlink()
    leak.job.check_apart()
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "style.safetensors").touch()
    write_declaration(folder, ["cifar10/test"], "")
    look = replace(leak.job.recipe, guidance=GuidanceSpec(scale=0.2, decoder=f"fitted:{folder}"))
    for changes in (
        {"loras": (f"{folder}@0.5",)}, {"loras": (str(folder / "style.safetensors"),)},
        {"patch": 0.5, "patches": str(folder)}, {"recipe": look},
    ):  # fmt: skip
        with pytest.raises(OverlapError, match=r"^(lora|patches|decoder) '.*more.*'cifar10/test'"):
            replace(leak.job, **changes).check()


def test_what_a_set_tells(call: Any, leak: Preset, tmp_path: Path) -> None:
    """Its manifest and card say what was declared; who has seen other data since is told, and refused what is new."""
    prior, out = Path(leak.job.model), tmp_path / "set"
    write_declaration(prior, ["glyphs"], "")
    draw_set(leak.job, Request(num_samples=6), out, workers=1)
    assert json.loads((out / "manifest.json").read_text())["source"]["declared"] == {
        "prior": "glyphs", "teacher": "cifar10/train",
    }  # fmt: skip
    text = (out / "README.md").read_text()
    assert "| prior trained on | `glyphs` |" in text
    assert "| teacher trained on | `cifar10/train` |" in text
    assert "not declared" not in text
    leak.job.check()
    write_declaration(prior, ["cinic-10"], "")
    done = call("replay", out, "--id", "0", "--out", tmp_path / "0.png")
    assert done.returncode == 0, done.stderr
    assert "'cinic-10'" in done.stderr
    assert "identical" in done.stdout
    _is_refused(call("synth", "--preset", "leak", "--num-samples", "12", "--out", out), str(prior), "cinic-10")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["source"]["declared"]["prior"] = "cifar10"
    (out / "manifest.json").write_text(json.dumps(manifest))
    done = call("distill", out, "--teacher", leak.job.teacher, "--out", tmp_path / "student", "--steps", "1")
    _is_refused(done, "set", "cifar10")
    assert not (tmp_path / "student").exists()
    assert apart.pool_declares(str(out)) == ("cifar10",)  # a set as a pool is what its prior has seen


def test_what_a_student_tells(leak: Preset, tmp_path: Path) -> None:
    """Its teacher's data is on its card, so that it counts where the student is a teacher; a pool is what it saw."""
    write_declaration(Path(leak.job.model), ["glyphs"], "")
    run = MethodRun(
        preset=replace(leak, distill=replace(leak.distill, steps=2, batch_size=2, arch="resnet", arch_args={})),
        method="pool", out=tmp_path / "out", pool=pool(tmp_path / "pool.npz", "svhn"),
    )  # fmt: skip
    result = run.execute()
    assert result["declared"] == {"teacher": "cifar10/train", "pool": "svhn"}
    about = read_card(tmp_path / "out" / "student.toml").about
    assert (about["trained_on"], about["teacher_trained_on"]) == (["svhn"], ["cifar10/train"])
    assert apart.card_declares(str(tmp_path / "out" / "student.toml")) == ("svhn", "cifar10/train")
    assert "synthetic images only" not in (tmp_path / "out" / "student.md").read_text()
    again = apart.student_seen(str(tmp_path / "out" / "student.toml"))
    assert again == {"teacher_trained_on": ["svhn", "cifar10/train"]}
