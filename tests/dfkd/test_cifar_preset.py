"""CIFAR-10's presets: their files from a small pack of the same format, and what is said where they are missing."""

import hashlib
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from synthkd.bench.cifar_pack import main, make, read_packed, unpacked
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.presets_cifar import cifar10, cifar10_mosaickd, cifar10_small
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine.errors import SynthkdError

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def packed(images: Any) -> bytes:
    """The format, value by value."""
    values = images.astype(int)
    if values.ndim == 3:
        values = values[..., None]
    else:
        values[..., 0] -= values[..., 1]
        values[..., 2] -= values[..., 1]
    values %= 256
    _, height, width, channels = values.shape
    out = []
    for c in range(channels):
        for v in values[..., c]:
            for y in range(height):
                for x in range(width):
                    left, upper = v[y, x - 1] if x else 0, v[y - 1, x] if y else 0
                    expected = left if y == 0 else upper if x == 0 else 0
                    if x and y:
                        expected = sorted((left, upper, left + upper - v[y - 1, x - 1]))[1]
                    out.append(int(v[y, x] - expected) % 256)
    return lzma.compress(bytes(out), format=lzma.FORMAT_XZ)


def write(path: Path, images: Any, **beside: Any) -> None:
    """One file of a pack."""
    blob = np.frombuffer(packed(images), np.uint8)
    np.savez(path, blob=blob, shape=np.array((*images.shape, 1)[:4]), **beside)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Two test images, four parts of three images of which two have a flag, and networks that know nothing."""
    folder, draw = tmp_path / "pack", np.random.default_rng(0)
    folder.mkdir()
    x = draw.integers(0, 256, (14, 32, 32, 3)).astype(np.uint8)
    np.save(folder / "all.npy", x)
    write(folder / "cifar10_test.npz", x[:2], y=np.array([3, 9], np.uint8), classes=np.array(NAMES))
    flags = np.eye(3, dtype=bool)
    for i in range(4):
        beside = {"in_cifar10": flags[i % 3], "dup_earlier": flags[(i + 1) % 3], "near_cifar10_class": np.zeros(3) > 0}
        beside["y"] = np.arange(3)
        write(folder / f"cifar100_part{i}.npz", x[2 + 3 * i : 5 + 3 * i], classes=np.arange(100), **beside)
    for name in ("resnet20", "resnet56"):
        save_file(build_net(name, 10, {}).state_dict(), folder / f"cifar10_{name}_akamaster.safetensors")
    names = sorted(f.name for f in folder.iterdir() if f.name != "all.npy")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


@pytest.mark.parametrize("shape", [(3, 7, 5, 3), (4, 5, 6)])
def test_unpacking_gives_back_what_was_packed(shape: tuple[int, ...]) -> None:
    """In colour and in grey, of odd sizes, against the format written out."""
    images = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    found = unpacked(packed(images), (*shape, 1)[:4])
    assert found.dtype == np.uint8
    assert np.array_equal(found, images)
    with pytest.raises(ValueError, match="bytes of images; expected"):
        unpacked(packed(images), (shape[0] - 1, *shape[1:], 1)[:4])


def test_the_command_makes_what_the_presets_read(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test set, pool without flagged images, teachers; the presets name them, and say which prior they lack."""
    out = tmp_path / "data" / "cifar10"
    assert main([str(pack), str(out)]) == 0
    assert "2 test images, 4 out-of-domain images, 2 teachers" in capsys.readouterr().out
    x = np.load(pack / "all.npy")
    kept = [2 + 3 * i + j for i in range(4) for j in range(3) if j not in (i % 3, (i + 1) % 3)]
    assert np.array_equal(np.load(out / "pool.npz")["x"], x[kept])
    assert np.array_equal(np.load(out / "test.npz")["x"], x[:2])
    monkeypatch.setenv("SYNTHKD_DATA", str(tmp_path / "data"))
    lacking = "preset {}: .*/cifar10/prior-{}/pipeline not found; make it with `make prior-cifar SIZE={}`"
    for preset, said in (
        (cifar10(), lacking.format("cifar10", "base", "base")),
        (cifar10_small(), lacking.format("cifar10-small", "small", "small")),
        (cifar10_mosaickd(), "has no diffusion prior to draw with"),
    ):
        assert Path(preset.job.teacher) == out / "teacher" / "resnet56.toml"
        assert load_teacher(preset.job.teacher).classes == NAMES
        assert preset.pool == str(out / "pool.npz")
        with pytest.raises(SynthkdError, match=said):
            preset.job.check()


def test_what_is_missing_or_damaged_is_one_line(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file, and the command that makes it."""
    monkeypatch.setenv("SYNTHKD_DATA", str(tmp_path / "none"))
    with pytest.raises(SynthkdError, match=r"resnet56.toml not found; make it with `python -m synthkd"):
        cifar10()
    part = pack / "cifar100_part2.npz"
    whole = part.read_bytes()
    part.write_bytes(whole[:-9000])
    with pytest.raises(SynthkdError, match="SHA-256"):
        make(pack, tmp_path / "data")
    with pytest.raises(SynthkdError, match="cannot be read"):
        read_packed(part)
    part.unlink()
    assert main([str(pack), str(tmp_path / "data")]) == 2
    assert "cifar100_part2.npz is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"classes": np.arange(1, 101)}, "its classes are not those of cifar100_part0.npz"),
        ({"y": np.array([0, 1, 100])}, r"y is 0..100; there are 100 classes"),
        ({"y": np.array([0, -1, 2])}, r"y is -1..2; there are 100 classes"),
        ({"y": np.array([0.0, 1.0, 2.0])}, "y is float64"),
        ({"classes": None}, "classes is missing"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(
    changes: dict[str, Any], expected: str, pack: Path, tmp_path: Path
) -> None:
    """Though their sums are right; no pool is left."""
    part = pack / "cifar100_part2.npz"
    old = hashlib.sha256(part.read_bytes()).hexdigest()
    with np.load(part) as found:
        arrays = {**found, **changes}
    np.savez(part, **{name: values for name, values in arrays.items() if values is not None})
    sums = pack / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, hashlib.sha256(part.read_bytes()).hexdigest()))
    with pytest.raises(SynthkdError, match=expected):
        make(pack, tmp_path / "data")
    assert not (tmp_path / "data" / "pool.npz").exists()
