"""Sets and tars made to deceive: one line of SynthkdError, or an answer; never a hang, a foreign write, or much memory.

`SYNTHKD_FUZZ=2000` draws that many examples of each kind instead of a few.
"""

import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from synthkd.dfkd.pools import open_images
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.toml_files import read_toml
from synthkd.engine import SynthkdError, write_shards
from synthkd.engine.encoding import tar_member
from synthkd.engine.fitted import read_card
from synthkd.engine.index import decoder_note, read_environments, read_manifest
from synthkd.engine.reading import decode_image, decode_meta, members, read_set
from synthkd.engine.tar import RECORD, foreign_members
from synthkd.engine.verify import verify_set

EXAMPLES = int(os.environ.get("SYNTHKD_FUZZ", "30"))
FUZZ = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SECONDS = 20  # that no look at a set of a few kilobytes may need


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A test that hangs fails."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(look: Callable[[], object]) -> str:
    """What a look at something hostile says: nothing, or one line."""
    said = ""
    with within(SECONDS):
        try:
            look()
        except SynthkdError as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 2000
    return said


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a small set lies that every example starts from."""
    return tmp_path_factory.mktemp("hostile") / "set"


@pytest.fixture
def small(clean: Path, canned: Callable[..., Any]) -> tuple[Path, Any]:
    """Twenty images: one finished shard, one that is under way; and their stream."""
    stream = canned(20, groups_per_shard=2)
    if not clean.exists():
        asked = iter(range(1, 9))
        write_shards(stream, clean, should_stop=lambda: next(asked) == 3)
        assert (clean / "shard-000001.tar.journal").exists()
    return clean, stream


def _looks(folder: Path, stream: Any) -> dict[str, Callable[[], object]]:
    return {
        "read": lambda: [sample.pixels for sample in read_set(folder)],
        "verify": lambda: verify_set(folder),
        "table": lambda: [source.encoded(i) for source in [open_set(folder, 8)] for i in range(len(source))],
        "notes": lambda: (decoder_note(read_manifest(folder)), read_environments(folder)),
        "resume": lambda: write_shards(stream, folder),
    }


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", ".lock-claim"))


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bits turned, parts cut out, doubled, moved, put in, or a number made giant."""
    kind = draw(st.sampled_from(("bits", "cut", "insert", "splice", "number", "word")))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)

    def apply(data: bytes) -> bytes:
        out, n = bytearray(data), max(1, len(data))
        at, length = int(rng.integers(n)), int(rng.integers(1, 64))
        if kind == "bits":
            for place in rng.integers(n, size=int(rng.integers(1, 6))) if data else ():
                out[place] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del out[at : at + (length if rng.random() < 0.5 else n)]
        elif kind == "insert":
            out[at:at] = rng.bytes(length)
        elif kind == "splice":
            start = int(rng.integers(n))
            out[at:at] = data[start : start + length * 16]
        elif kind == "number":
            digits = [i for i, c in enumerate(data) if chr(c).isdigit()]
            if digits:
                out[digits[at % len(digits)]] = ord("9")
                place = digits[at % len(digits)]
                out[place:place] = [b"9" * 30, b"9" * 5000, b"-", b"1e999", b"0."][seed % 5]
        else:
            words = (b"NaN", b"null", b"[" * 5000, b'{"a":', b"true", b'"\\ud800"', b"\xff", b"Infinity", b"\n", b"\0")
            out[at : at + 1] = words[seed % len(words)]
        return bytes(out)

    return apply


@FUZZ
@given(which=st.integers(0, 10**6), change=changes(), again=st.booleans())
def test_no_damage_to_a_set_ends_in_anything_but_a_line(
    small: tuple[Path, Any], which: int, change: Callable[[bytes], bytes], again: bool
) -> None:
    """Any file of the set, damaged once or twice; each way to look at it, and to go on with it."""
    clean, stream = small
    root = clean.parent / "example"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "beside").write_text("not of the set")
    folder = Path(shutil.copytree(clean, root / "set"))
    path = _files(folder)[which % len(_files(folder))]
    path.write_bytes(change(change(path.read_bytes()) if again else path.read_bytes()))
    for look in _looks(folder, stream).values():
        told(look)
    assert {p.name for p in root.iterdir()} == {"beside", "set"}
    assert (root / "beside").read_text() == "not of the set"


HEADER = st.fixed_dictionaries(
    {
        "name": st.sampled_from(("000000000.png", "000000000.json", "../../x", "/etc/x", "-x", ".x", "a/b", "a\nb")),
        "type": st.sampled_from([bytes([c]) for c in b"01234567xgLKSVDMNX"] + [b"\0"]),
        "size": st.sampled_from((0, 1, 511, 512, 513, 2**20, 2**33 - 1)),
        "linkname": st.sampled_from(("", "/etc/passwd")),
        "format": st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT)),
        "body": st.one_of(st.binary(max_size=40), st.sampled_from((b"17 path=../../etc\n", b"13 size=-512\n"))),
    }
)


def _tar(headers: list[dict[str, Any]], end: int) -> bytes:
    out = b""
    for fields in headers:
        info = tarfile.TarInfo(fields["name"])
        info.type, info.size, info.linkname = fields["type"], fields["size"], fields["linkname"]
        body = fields["body"]
        out += info.tobuf(fields["format"]) + body + b"\0" * (-len(body) % 512)
    return out + b"\0" * end


@FUZZ
@given(headers=st.lists(HEADER, max_size=6), end=st.sampled_from((0, 100, 512, 1024, RECORD, 3 * RECORD)))
def test_tars_of_every_kind_of_member(tmp_path_factory: pytest.TempPathFactory, headers: Any, end: int) -> None:
    """Strangers' shards: a plain file, or one line; pools' tars: a position within the file, or one line."""
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(_tar(headers, end))
    size = path.stat().st_size
    told(lambda: [None for name, data in members(path) if ("/" in name or len(data) > size) and 1 / 0])
    found: list[Any] = []
    told(lambda: found.extend(foreign_members(path)))
    assert all(0 <= m.offset <= m.offset + m.size <= size and m.name.isprintable() for m in found)


@FUZZ
@given(data=st.binary(max_size=3000))
def test_bytes_of_any_kind(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.tar"
    path.write_bytes(data)
    assert told(lambda: list(members(path)))
    told(lambda: list(foreign_members(path)))
    told(lambda: decode_image(data, "x"))
    told(lambda: decode_meta(data, "x"))


@pytest.mark.parametrize(
    "tail", [b"", b"\0" * 512, b"\0" * 1024 + b"x", b"\0" * 1024 + tar_member("b.png", b"x"), b"\0" * 4 * RECORD]
)
def test_the_end_of_a_shard(tmp_path: Path, tail: bytes) -> None:
    """Two blocks of zeros, a record at most; nothing hides behind them."""
    path, whole = tmp_path / "shard-000000.tar", tar_member("a.png", b"data")
    path.write_bytes(whole + tail)
    assert "end mark" in told(lambda: list(members(path)))
    for zeros in (1024, RECORD - len(whole)):
        path.write_bytes(whole + b"\0" * zeros)
        assert list(members(path)) == [("a.png", b"data")]


def _member(name: str, data: bytes = b"image", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % 512)


@pytest.mark.parametrize("name", ["..", "a..b", "-rf.png", ".hidden", "a\\b.png", "\x1b[31m.png", "a b.png", "é.png"])
def test_names_that_no_set_has(tmp_path: Path, name: str) -> None:
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(_member(name) + b"\0" * 1024)
    assert "is not a plain file of a sample" in told(lambda: list(members(path)))


def test_tars_of_other_writers(tmp_path: Path) -> None:
    """Folders, long names and links as tarfile writes them in its three formats: what tarfile itself finds."""
    for how in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "foreign.tar"
        with tarfile.open(path, "w", format=how) as tar:
            for name in ("./a.png", "deep/" * 15 + "é" * 20 + ".png", "folder/" * 9 + "b" * 60 + ".jpg"):
                info = tarfile.TarInfo(name)
                info.size = 700
                tar.addfile(info, io.BytesIO(name.encode().ljust(700)))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        with tarfile.open(path) as tar:
            want = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
        assert [tuple(m) for m in foreign_members(path)] == want


def test_a_pool_of_hostile_tars(tmp_path: Path) -> None:
    """A chain of extended headers, a negative size, and a loop: one line each."""
    extended = _member("x", b"12 a=bcdefg\n", type=tarfile.XHDTYPE)
    for i, data in enumerate(
        (
            extended * 3000,
            _member("x", b"14 size=-1024\n", type=tarfile.XHDTYPE) + _member("a.png"),
            _member("x", b"z" * 2**17, type=tarfile.GNUTYPE_LONGNAME) + _member("a.png"),
            _member("a.png", size=10**9),
        )
    ):
        (tmp_path / f"{i}.tar").write_bytes(data)
        assert told(lambda i=i: open_images(str(tmp_path / f"{i}.tar")))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"9" * 21 + b"}",
        b'{"a": 1e999}', b'{"a": NaN}', b"[" * 10**6, b"\xff", b"null", b'{"format": 2' + b" " * 17 * 2**20 + b"}",
    ],
)  # fmt: skip
def test_notes_that_parsers_disagree_on(small: tuple[Path, Any], tmp_path: Path, text: bytes) -> None:
    folder = Path(shutil.copytree(small[0], tmp_path / "set"))
    (folder / "manifest.json").write_bytes(text)
    assert "manifest.json" in told(lambda: read_manifest(folder))
    for path in (folder / "environments").glob("*.json"):
        path.write_bytes(text)
    assert read_environments(folder) == {}
    (tmp_path / "decoder.json").write_bytes(text)
    assert "decoder.json" in told(lambda: read_card(str(tmp_path)))


@pytest.mark.parametrize("name", ["manifest.json", "index.jsonl", "rows/shard-000000.jsonl", "shard-000000.tar"])
@pytest.mark.parametrize("how", ["link", "pipe", "folder", "linked folder"])
def test_links_pipes_and_folders_in_place_of_files(
    small: tuple[Path, Any], tmp_path: Path, name: str, how: str
) -> None:
    """A reader neither follows a link out of the set nor waits; a writer touches nothing outside."""
    folder, secret = Path(shutil.copytree(small[0], tmp_path / "set")), tmp_path / "secret"
    path = folder / name
    secret.write_bytes(path.read_bytes())
    before = secret.read_bytes()
    if how == "linked folder":
        if path.parent == folder:
            return
        shutil.move(path.parent, tmp_path / "elsewhere")
        path.parent.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        {"link": lambda: path.symlink_to(secret), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[how]()
    for what, look in _looks(folder, small[1]).items():
        said = told(look)
        assert said or what not in ("read", "table"), (what, how)
    assert secret.exists()
    assert secret.read_bytes() == before


@pytest.mark.parametrize("name", ["shard-000001.tar.part", "shard-000001.tar.journal", ".lock", "index.jsonl.tmp"])
def test_a_writer_follows_no_link_out_of_the_set(small: tuple[Path, Any], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(small[0], tmp_path / "set"))
    (tmp_path / "secret").write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    assert "a link that leaves the set's folder" in told(lambda: write_shards(small[1], folder))
    assert (tmp_path / "secret").read_text() == "mine"


def test_links_within_the_set_and_to_the_set_are_followed(small: tuple[Path, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small[0], tmp_path / "set"))
    (folder / "shard-000000.tar").rename(folder / "kept.tar")
    (folder / "shard-000000.tar").symlink_to("kept.tar")
    (tmp_path / "alias").symlink_to(folder)
    assert len(list(read_set(tmp_path / "alias"))) == 12


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bombs(folder: Path) -> list[Path]:
    """Small files that want gigabytes or minutes."""
    zeros = zlib.compress(b"\0" * 2**27)
    start = b"\x89PNG\r\n\x1a\n"
    plain = _chunk(b"IDAT", zlib.compress(b"\0" * 25 * 8)) + _chunk(b"IEND", b"")
    small, giant = (_chunk(b"IHDR", struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0)) for n in (8, 60000))
    buffer = io.BytesIO()
    frame = Image.new("RGB", (16, 16))
    frame.save(buffer, "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(60)])
    jpeg = io.BytesIO()
    Image.new("RGB", (1024, 1024)).save(jpeg, "JPEG", progressive=True)
    data = jpeg.getvalue()
    scan = data[data.index(b"\xff\xda") : data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)]
    files = {
        "text.png": start + small + _chunk(b"zTXt", b"a\0\0" + zeros) + plain,
        "texts.png": start + small + _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**6)) * 100 + plain,
        "profile.png": start + small + _chunk(b"iCCP", b"a\0\0" + zeros) + plain,
        "giant.png": start + giant + _chunk(b"IDAT", zeros) + _chunk(b"IEND", b""),
        "frames.webp": buffer.getvalue(),
        "giant.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff" + b"VP8 \0\0\0\0",
        "scans.jpg": data[:-2] + scan * 5000 + data[-2:],
        "giant.jpg": data.replace(b"\x04\x00\x04\x00", b"\xff\xff\xff\xff", 1),
        "deep.json": b'{"a":' * 800_000,
        "wide.json": b"[" + b"[]," * 1_300_000 + b"[]]",
    }
    paths = [folder / name for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    return paths


_CHILD = """
import resource, sys
from pathlib import Path
from synthkd.dfkd.decode import decode
from synthkd.engine.errors import SynthkdError
from synthkd.engine.reading import decode_image, decode_meta
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
for path in map(Path, sys.argv[1:]):
    data = path.read_bytes()
    for look in (decode_meta,) if path.suffix == ".json" else (decode_image, decode):
        try:
            look(data, path.name)
            print(path.name, "read")
        except SynthkdError as error:
            assert "\\n" not in str(error)
            print(path.name, "refused")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address space is read from /proc")
def test_bombs_under_a_limit_of_memory(tmp_path: Path) -> None:
    """600 MiB of address space more than the imports need, and 60 s; MemoryError would be a traceback, exit code 1."""
    paths = _bombs(tmp_path)
    assert max(p.stat().st_size for p in paths) < 2**26
    words = [sys.executable, "-c", _CHILD, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split() for line in done.stdout.splitlines())
    assert set(said) == {p.name for p in paths}
    assert {name for name, verdict in said.items() if verdict == "read"} <= {"frames.webp", "text.png", "profile.png"}
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 0


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 20000) + " = 1", "[" + ".".join(["'a'"] * 20000) + "]", "a = " + "[" * 5000, "a = 1\na = 2",
        "a = 0x" + "f" * 5000, "a = '" + "x" * 5 * 2**20 + "'", "\0", "a = " + "{b = " * 5000,
    ],
)  # fmt: skip
def test_cards_that_take_long(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.toml").write_text(text)
    with within(5):
        assert "not valid TOML" in told(lambda: read_toml(tmp_path / "card.toml", "card"))


def test_a_card_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "card.toml")
    assert "not a plain file" in told(lambda: read_toml(tmp_path / "card.toml", "card"))


def test_a_long_line_is_no_dotted_name(tmp_path: Path) -> None:
    weights = ", ".join(f"class{i} = {i}.5" for i in range(500))
    about = "e.g. this. and. that. " + "a. b " * 500
    (tmp_path / "targets.toml").write_text(f"weights = {{{weights}}}\nabout = '{about}'")
    assert len(read_toml(tmp_path / "targets.toml", "x")["weights"]) == 500


def test_counts_that_are_none(small: tuple[Path, Any], tmp_path: Path) -> None:
    """A row whose figures no float holds, or whose places are no whole numbers."""
    folder = Path(shutil.copytree(small[0], tmp_path / "set"))
    listed = folder / "rows/shard-000000.jsonl"
    journal = folder / "shard-000001.tar.journal"
    row = json.loads(listed.read_text().splitlines()[0]) | {"group": 2}
    for change in (
        {"seconds": {"draw": 10**400}}, {"curves": {"ce": [10**400]}}, {"curves": {"ce": ["x"]}}, {"kept": -1},
        {"table": {**row["table"], "offset": [-1]}}, {"table": {**row["table"], "label": [1.5]}},
        {"table": {**row["table"], "losses.ce": [10**400]}}, {"members": {"a": 5}}, {"environment": 5},
    ):  # fmt: skip
        journal.write_text(json.dumps({**row, **change}) + "\n")
        assert "a row is not a synthkd group's" in told(lambda: write_shards(small[1], folder)), change


@pytest.mark.parametrize(
    "changes_",
    [
        {"num_samples": 10**12}, {"groups_per_shard": 10**12, "num_samples": 10**12}, {"classes_per_group": 10**9},
        {"samples_per_class": 10**9}, {"num_samples": 10**13}, {"classes": ["a"] * 10**5}, {"rounds": 10**9},
        {"groups_per_round": 10**15}, {"previews": [0.5] * 10**5},
    ],
)  # fmt: skip
def test_plans_of_no_set(small: tuple[Path, Any], tmp_path: Path, changes_: dict[str, Any]) -> None:
    """Counts that would make a check run for years or list more groups than memory holds."""
    folder = Path(shutil.copytree(small[0], tmp_path / "set"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["num_samples"] = changes_.get("num_samples", manifest["num_samples"])
    manifest["recipe"] |= {name: value for name, value in changes_.items() if name != "num_samples"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for what, look in _looks(folder, small[1]).items():
        told(look) if what != "verify" else told(lambda: list(verify_set(folder).problems))
