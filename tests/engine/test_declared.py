"""What a network has seen: names of data sets, which of them have images in common, and declarations by strangers."""

import json
import os
from pathlib import Path

import pytest

from synthkd.engine.declared import (
    DECLARATION,
    MAX_DECLARATION,
    OverlapError,
    check_apart,
    check_names,
    check_weights,
    from_words,
    in_words,
    overlap,
    read_declaration,
    write_declaration,
)
from synthkd.engine.errors import SynthkdError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cifar10", "cifar10"),
        ("cifar10", "cifar10/train"),
        ("pacs", "pacs/sketch/train"),
        ("cifar-10/train", "cifar10"),
        ("tiny-images", "cifar10/train"),
        ("80m-tiny-images", "cifar100"),
        ("imagenet-21k", "tiny_imagenet"),
        ("imagenet", "ilsvrc2012/train"),
        ("cinic-10/imagenet", "cifar10"),
        ("cifar10/test", "cifar10/train"),
        ("pacs/sketch/test", "pacs/sketch/train"),
        ("cifar100", "cifar10/train"),
        ("cifar100/without-cifar10", "cifar100/train"),
        ("cifar10/without-train", "cifar10/train"),
        ("tu-berlin", "pacs/sketch/train"),
        ("pacs", "sketchy"),
        ("emnist/letters", "mnist"),
        ("pacs/train", "pacs/sketch/train"),
        ("pacs/test", "pacs/sketch/train"),
        ("imagenet1k/train", "imagenet1k/n01440764"),
        ("imagenet32", "imagenet64/train"),
        ("imagenet32/train", "tiny-imagenet"),
        ("cinic10", "imagenet1k/train"),
        ("cinic10", "imagenet21k/without-imagenet"),
        ("tiny-images", "cinic10"),
        ("cinic10", "cifar100"),
        ("tiny-images/without-cifar10", "cifar100/without-cifar10"),
    ],
)
def test_in_common(one: str, other: str) -> None:
    """Whichever side names it."""
    assert overlap(["glyphs", one], [other]) == (one, other)
    assert overlap([other], [one, "glyphs"]) == (other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cifar10", "cifar100/without-cifar10"),
        ("cifar10/train", "cifar"),
        ("cifar10", "cifar10.1"),
        ("pacs/photo/train", "pacs/sketch/train"),
        ("pacs/without-sketch", "pacs/sketch/train"),
        ("tiny-images/without-cifar10", "cifar10/train"),
        ("imagenet21k/without-imagenet", "tiny-imagenet"),
        ("digits/train", "digits-mine/train"),
        ("tu-berlin", "pacs/photo"),
        ("glyphs", "letters"),
        ("train", "test-images"),
        ("cinic10", "cifar100/without-cifar10"),
        ("tiny-images/without-cifar10/without-cifar100", "cinic10"),
        ("pacs/without-sketch", "tu-berlin"),
        ("cinic10", "tiny-imagenet"),
    ],
)
def test_apart(one: str, other: str) -> None:
    """Names that only look alike, other domains, and what was taken out."""
    assert overlap([one], [other]) is None
    assert overlap([other], [one]) is None


def test_the_refusal() -> None:
    """One line that says who has seen what, and what to do; who declares nothing is let through."""
    with pytest.raises(OverlapError) as refused:
        check_apart("prior 'mine'", ["glyphs", "cinic10"], ["cifar10/train"])
    said = str(refused.value)
    assert "\n" not in said
    for part in ("prior 'mine'", "'cinic10'", "'cifar10/train'", "no option allows it"):
        assert part in said
    check_apart("prior", None, ["cifar10"])
    check_apart("prior", ["cifar10"], None)


@pytest.mark.parametrize(
    "names",
    [
        [], [""], "cifar10", None, {"cifar10": 1}, 3, [1], [["cifar10"]], ["CIFAR-10"], ["cifar10/"], ["/etc/passwd"],
        ["a/../b"], ["cifar10\n"], ["unknown"], ["without-cifar10"], ["a" * 201], ["a"] * 257, [float("nan")], ["zéro"],
    ],
)  # fmt: skip
def test_no_names(names: object) -> None:
    """One line that begins with the place and does not grow with what was found."""
    with pytest.raises(SynthkdError, match=r"^card: trained_on ") as refused:
        check_names("card: trained_on", names)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_words_and_back() -> None:
    """As results and manifests have them."""
    for names in (("glyphs",), ("pacs/art", "pacs/photo"), None):
        assert from_words(in_words(names)) == names
    assert in_words(None) == "not declared"
    for text in (None, 3, "", "Some images", ["glyphs"], "a, ,b"):
        assert from_words(text) is None


def test_a_declaration_is_read_as_written(tmp_path: Path) -> None:
    """With the digests of the weights; in a folder without one nothing is declared."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"abc")
    assert read_declaration(tmp_path) is None
    sums = write_declaration(tmp_path, ["pacs/art", "pacs/photo"], "0" * 64)
    assert list(sums) == ["unet/w.safetensors"]
    assert sums["unet/w.safetensors"].startswith("ba7816bf")
    assert read_declaration(tmp_path) == ("pacs/art", "pacs/photo")
    (tmp_path / DECLARATION).rename(tmp_path / "blob")  # as a hub's cache keeps files
    (tmp_path / DECLARATION).symlink_to(tmp_path / "blob")
    assert read_declaration(tmp_path) == ("pacs/art", "pacs/photo")
    with pytest.raises(SynthkdError, match="trained_on has 0 names"):
        write_declaration(tmp_path, [], "")


def test_other_weights_than_were_declared(tmp_path: Path) -> None:
    """Swapped, missing or outside: refused where the declaration has sums; one by hand has none."""
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "w.safetensors"
    weights.write_bytes(b"abc")
    check_weights(tmp_path)
    write_declaration(tmp_path, ["glyphs"], "")
    check_weights(tmp_path)
    weights.write_bytes(b"abd")
    with pytest.raises(SynthkdError, match=r"unet/w.safetensors is missing, or not the file"):
        check_weights(tmp_path)
    weights.unlink()
    with pytest.raises(SynthkdError, match="is missing"):
        check_weights(tmp_path)
    for sums in ({"../w.safetensors": ""}, {"/etc/w.safetensors": ""}, {"config.json": ""}, [1], {"a.safetensors": 1}):
        (tmp_path / DECLARATION).write_text(json.dumps({**GOOD, "sha256": sums}))
        with pytest.raises(SynthkdError, match=f"{DECLARATION}: sha256 "):
            check_weights(tmp_path)
    (tmp_path / DECLARATION).write_text(json.dumps(GOOD))
    check_weights(tmp_path)


GOOD = {"format": 1, "trained_on": ["glyphs"]}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", "null", '"glyphs"', "NaN", "[" * 100_000, json.dumps({**GOOD, "format": 2}),
        json.dumps({**GOOD, "format": True}), json.dumps({"format": 1}), json.dumps({**GOOD, "trained_on": "glyphs"}),
        json.dumps({**GOOD, "trained_on": [None]}), '{"format": 1, "trained_on": [NaN]}',
        '{"format": 1, "trained_on": ["cifar10"], "trained_on": ["glyphs"]}', json.dumps(GOOD) + " " * MAX_DECLARATION,
        json.dumps({**GOOD, "trained_on": ["a"] * 100_000}), "\ud800",
    ],
)  # fmt: skip
def test_a_declaration_by_a_stranger(tmp_path: Path, text: str) -> None:
    """What cannot be read is refused, in a line that names the file, and is never taken for none."""
    (tmp_path / DECLARATION).write_text(text, errors="surrogatepass")
    with pytest.raises(SynthkdError) as refused:
        read_declaration(tmp_path)
    assert str(refused.value).startswith(str(tmp_path / DECLARATION))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "device", "circle"])
def test_no_plain_file(tmp_path: Path, kind: str) -> None:
    """Refused at once: a pipe would wait for ever, a link to nothing is no word of nothing."""
    path = tmp_path / DECLARATION
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling": tmp_path / "gone", "device": Path("/dev/zero"), "circle": path}[kind])
    with pytest.raises(SynthkdError, match=DECLARATION):
        read_declaration(tmp_path)
