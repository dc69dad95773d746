"""A set as folders by class: whole files, safe names, splits that stay, and going on after a kill."""

import csv
import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd import export_folder as module
from synthkd.dfkd.export_folder import export_images, folder_names, parse_split, split_of
from synthkd.engine import SynthkdError
from synthkd.engine.plan import sample_key

SHARES = {"train": 0.7, "val": 0.3}


def stored(folder: Path) -> dict[str, bytes]:
    """Images of all shards by name."""
    out = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            out |= {i.name: tar.extractfile(i).read() for i in tar if i.name.endswith(".png")}  # type: ignore[union-attr]
    return out


def exported(out: Path) -> dict[str, bytes]:
    """Image files below a folder by name; no name twice."""
    found = [path for path in out.rglob("*.png") if ".partial" not in path.parts]
    assert len({path.name for path in found}) == len(found)
    return {path.name: path.read_bytes() for path in found}


def test_a_changed_file_is_written_again(tiny_set: Path, tmp_path: Path) -> None:
    """One of the right size, and a link; cells that a spreadsheet would reckon out stand after a '."""
    out = tmp_path / "out"
    export_images(tiny_set, out, SHARES)
    first, second = sorted(out.rglob("*.png"))[:2]
    kept = second.read_bytes()
    first.write_bytes(bytes(len(first.read_bytes())))
    second.rename(tmp_path / "away")
    second.symlink_to(tmp_path / "away")
    assert export_images(tiny_set, out, SHARES).written == 2
    assert exported(out) == stored(tiny_set)
    assert not second.is_symlink()
    assert (tmp_path / "away").read_bytes() == kept
    assert [module.as_text(t) for t in ("=1+1", "+a", "-a", "@a", "\ta", "a=1")] == [
        "'=1+1", "'+a", "'-a", "'@a", "'\ta", "a=1",
    ]  # fmt: skip


def test_every_image_once_under_its_class(tiny_set: Path, tmp_path: Path) -> None:
    """Bytes are the set's; labels.csv and classes.json say where each lies; a second call writes nothing."""
    done = export_images(tiny_set, tmp_path / "out", SHARES)
    assert (done.present, done.written, done.stopped) == (30, 30, False)
    assert exported(tmp_path / "out") == stored(tiny_set)
    with (tmp_path / "out/labels.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [row["key"] for row in rows] == [sample_key(i) for i in range(30)]
    for row in rows:
        assert row["file"] == f"{row['split']}/{row['class']}/{row['key']}.png"
        assert (tmp_path / "out" / row["file"]).is_file()
        assert row["split"] == split_of(row["key"], 5, SHARES)
    assert {row["split"] for row in rows} == {"train", "val"}
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert [(c["class"], c["label"], c["sorted"]) for c in classes] == [("cat", 0, 1), ("dog", 1, 2), ("bird", 2, 0)]
    assert export_images(tiny_set, tmp_path / "out", SHARES).written == 0
    assert not (tmp_path / "out/.partial").exists()


def test_goes_on_after_a_kill(
    tiny_set: Path, tmp_path: Path, killed: Callable[[Callable[[], object]], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a file: what is there is whole, the rest is written by the next call."""
    out, real, calls = tmp_path / "out", Path.write_bytes, Counter[str]()

    def dying(path: Path, data: bytes) -> int:
        calls["n"] += 1
        if calls["n"] == 12:
            real(path, data[:50])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", dying)
        assert killed(lambda: export_images(tiny_set, out, SHARES))
    whole = stored(tiny_set)
    assert len(exported(out)) == 11
    assert all(whole[name] == data for name, data in exported(out).items())
    # as a power cut may leave it
    next(path for path in out.rglob("*.png") if ".partial" not in path.parts).write_bytes(b"")
    assert export_images(tiny_set, out, SHARES).written == 20
    assert exported(out) == whole


def test_a_stop_keeps_what_is_there(tiny_set: Path, tmp_path: Path) -> None:
    """Asked to stop, it ends after a whole image; no list claims what is not there."""
    asked = iter([False] * 7 + [True])
    done = export_images(tiny_set, tmp_path / "out", SHARES, should_stop=lambda: next(asked))
    assert (done.written, done.stopped) == (7, True)
    assert not (tmp_path / "out/labels.csv").exists()


def test_another_folder_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    """What is not an export of this set with these shares stays as it is."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SynthkdError, match="is not empty and holds no export"):
        export_images(tiny_set, tmp_path, SHARES)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    export_images(tiny_set, tmp_path / "out", SHARES)
    with pytest.raises(SynthkdError, match="holds another export"):
        export_images(tiny_set, tmp_path / "out", {"train": 1.0})
    with pytest.raises(SynthkdError, match="is not empty"):
        export_images(tiny_set, tiny_set, SHARES)
    (tmp_path / "out/export.json").write_text("[[[")
    with pytest.raises(SynthkdError, match="not the note of an export"):
        export_images(tiny_set, tmp_path / "out", SHARES)


def test_a_damaged_image_is_named_and_not_written(tiny_set: Path, tmp_path: Path) -> None:
    """A turned bit is found by the digest."""
    copy = tmp_path / "set"
    shutil.copytree(tiny_set, copy)
    with (copy / "shard-000000.tar").open("rb+") as f:
        f.seek(600)
        byte = f.read(1)
        f.seek(600)
        f.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SynthkdError, match=r"000000000\.png does not match its digest; run `synthkd verify"):
        export_images(copy, tmp_path / "out", SHARES)
    assert not exported(tmp_path / "out")


def test_previews_come_when_asked(
    tiny_set: Path, tmp_path: Path, vouch: Callable[[Path, int, Mapping[str, bytes]], None]
) -> None:
    """A preview lies beside its image's split; without --previews it is left out; a forged one is refused."""
    copy, image = tmp_path / "set", stored(tiny_set)["000000000.png"]
    shutil.copytree(tiny_set, copy)
    with tarfile.open(copy / "shard-000000.tar") as tar:
        content = {i.name: tar.extractfile(i).read() for i in tar}  # type: ignore[union-attr]

    def with_preview(name: str, **meta: Any) -> None:
        note = json.dumps({"preview": 0.5, "of": "000000000", **meta}).encode()
        vouch(copy, 0, {**content, f"{name}.png": image, f"{name}.json": note})

    with_preview("000000000-p50", label=1)
    assert export_images(copy, tmp_path / "a", SHARES, previews=True).present == 31
    split = split_of("000000000", 5, SHARES)
    assert (tmp_path / f"a/{split}/dog/000000000-p50.png").read_bytes() == image
    assert export_images(copy, tmp_path / "b", SHARES).present == 30
    for name, label in (("xy-p50", 1), ("000000000-p50", 3), ("000000000-p50", -1)):
        with_preview(name, label=label)
        with pytest.raises(SynthkdError, match="not a preview's name and label"):
            export_images(copy, tmp_path / f"c{label}{len(name)}", SHARES, previews=True)


def test_folder_names_are_safe() -> None:
    """Never a path, a hidden or reserved name, too long or twice the same, whatever the case; always the same."""
    hostile = [
        "cat", "Cat", "CAT", "../../etc", "/etc/passwd", "..", ".", "", ".git", "a/b", "a_b", "a\\b", "con", "COM1.txt",
        "nul\x00", "x" * 300, "y" * 300, "é" * 100, "e\u0301", "\u00e9", "trailing. ", "-rf", "a\nb", "cat-1",
        "\u202eabc",
    ]  # fmt: skip
    names = folder_names(hostile)
    assert len({name.casefold() for name in names}) == len(hostile)
    for name in names:
        assert name == Path(name).name
        assert not set('/\\:*?"<>|\0\n ') & set(name)
        assert not name.startswith((".", "-"))
        assert not name.endswith((".", " "))
        assert 0 < len(name.encode()) <= 90
        assert name.split(".")[0].lower() not in ("con", "nul", "com1")
    assert names == folder_names(hostile)
    assert folder_names(["zero", "a b"]) == ["zero", "a_b"]


def test_split_holds_its_shares() -> None:
    """Shares are met, every key has its place by itself, and another seed deals anew."""
    keys = [sample_key(i) for i in range(20_000)]
    shares = {"train": 0.8, "val": 0.15, "test": 0.05}
    counts = Counter(split_of(key, 0, shares) for key in keys)
    for name, share in shares.items():
        assert abs(counts[name] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
    assert sum(split_of(key, 0, shares) != split_of(key, 1, shares) for key in keys) > 4000
    assert parse_split("train=0.8, val=0.15,test=0.05") == shares


@pytest.mark.parametrize(
    "text", ["", "train", "train=0", "train=1.5", "a=0.5,a=0.5", "../x=1", "con=1", "a=0.4,b=0.4", "a=nan"]
)
def test_a_wrong_split_is_one_line(text: str) -> None:
    """What is no split is refused before anything is written."""
    with pytest.raises(SynthkdError, match="--split"):
        parse_split(text)


def test_cli(tiny_set: Path, tmp_path: Path, call: Any) -> None:
    """The command says how many images are there; a full disk is one line."""
    done = call("export-folder", tiny_set, "--out", tmp_path / "out", "--split", "train=0.9,val=0.1")
    assert done.returncode == 0, done.stderr
    assert "30 images, 30 written now" in done.stdout
    again = call("export-folder", tiny_set, "--out", tmp_path / "out")
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1


def test_a_full_disk_is_one_line(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's word, not a traceback."""
    import errno

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(module.Path, "write_bytes", full)
    with pytest.raises(SynthkdError, match="no space left"):
        export_images(tiny_set, tmp_path / "out", SHARES)
