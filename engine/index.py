"""What a set's folder says of itself: manifest, index rows, journals. Plain JSON, written atomically."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synthkd.engine.environment import environment_key
from synthkd.engine.errors import SynthkdError

MANIFEST, INDEX, ENVIRONMENTS, LOCK = "manifest.json", "index.jsonl", "environments.json", ".lock"
CHECKPOINTS, CHECKPOINT_FILES = "checkpoints", ("student.toml", "student.safetensors")
DECODER, DECODER_FILES = "decoder", ("decoder.json", "decoder.safetensors")
FORMAT = 1


@dataclass(frozen=True)
class GroupRow:
    """One finished group in a shard: kept samples, where its bytes end, and what was measured while it was drawn.

    members: file name in the tar -> first 16 hexadecimal digits of its SHA-256.
    """

    group: int
    attempt: int
    kept: int
    end: int
    environment: str
    members: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardRow:
    """One finished shard: its digest over the whole file, and its groups."""

    shard: int
    file: str
    samples: int
    bytes: int
    sha256: str
    groups: list[GroupRow]


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and force it to disk."""
    with path.open("a") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")
        f.flush()
        os.fsync(f.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole JSON lines of a file; a torn last line, left by a killed run, is passed over."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def mend_tail(path: Path) -> None:
    """Cut a torn last line off a file, so that the next row starts on a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("rb+") as f:
            f.truncate(whole)


def group_row(data: Mapping[str, Any]) -> GroupRow:
    """A journal line as a row."""
    return GroupRow(**data)


def note_environment(folder: Path, detail: Mapping[str, Any]) -> str:
    """The key of an environment; what it stands for is kept in the folder's environments.json."""
    key = environment_key(dict(detail))
    path = folder / ENVIRONMENTS
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        write_atomically(path, json.dumps({**known, key: detail}, indent=2, sort_keys=True) + "\n")
    return key


def read_environments(folder: Path) -> dict[str, dict[str, Any]]:
    """What the keys in a folder's rows stand for; empty where that cannot be read, since images do not hang on it."""
    try:
        known = json.loads((folder / ENVIRONMENTS).read_text())
    except (OSError, ValueError):
        return {}
    return {key: detail for key, detail in known.items() if isinstance(detail, dict)} if isinstance(known, dict) else {}


def read_journal(path: Path) -> dict[int, GroupRow]:
    """Rows of an unfinished shard by group, the newest of each."""
    return merge_rows(group_row(d) for d in _lines(path))


def merge_rows(rows: Iterator[GroupRow]) -> dict[int, GroupRow]:
    """The newest row of each group, with the members of all its rows (a grown group is written in two parts)."""
    out: dict[int, GroupRow] = {}
    for row in rows:
        before = out.get(row.group)
        members = {**before.members, **row.members} if before else row.members
        out[row.group] = GroupRow(**{**asdict(row), "members": members})
    return out


def read_index(folder: Path) -> dict[int, ShardRow]:
    """Rows of all finished shards whose file is there, the newest of each.

    Raises SynthkdError for a row that is not one of ours.
    """
    out = {}
    for data in _lines(folder / INDEX):
        try:
            row = ShardRow(**{**data, "groups": [group_row(g) for g in data["groups"]]})
            _check_row(row)
        except (TypeError, KeyError) as error:
            raise SynthkdError(f"{folder / INDEX}: a row is not a synthkd index row ({error})") from error
        if row.file != shard_name(row.shard):
            raise SynthkdError(f"{folder / INDEX}: shard {row.shard} names file {row.file!r}; expected a shard name")
        out[row.shard] = row
    return {shard: row for shard, row in out.items() if (folder / row.file).exists()}


def _check_row(row: ShardRow) -> None:
    """Raise TypeError where a count is no whole number, or a table no table."""
    counts = [row.shard, row.samples, row.bytes]
    counts += [n for g in row.groups for n in (g.group, g.attempt, g.kept, g.end)]
    if not all(type(n) is int and n >= 0 for n in counts):
        raise TypeError("a count is not a whole number")
    if not all(isinstance(g.members, dict) for g in row.groups):
        raise TypeError("members is not a table")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a set; raises SynthkdError where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / "shards" / MANIFEST).is_file():
            raise SynthkdError(f"{folder}: no {MANIFEST}; this is a run, its set is {folder / 'shards'}")
        raise SynthkdError(f"{folder}: no {MANIFEST} there; expected the folder of a set, written by `synthkd synth`")
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise SynthkdError(f"{path}: format {data['format']!r}; this version reads {FORMAT}")
        _ = data["fingerprint"], data["recipe"]["image_format"], data["guidance"], data["model_sha256"]
        if type(data["seed"]) is not int or type(data["num_samples"]) is not int:
            raise TypeError("seed or num_samples is not a whole number")
        if not (0 <= data["seed"] < 2**63 and 1 <= data["num_samples"] < 2**63):
            raise ValueError("seed or num_samples is out of its range")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SynthkdError(f"{path}: not a synthkd manifest ({error!r})") from error
    return data


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    out: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out


def claim_folder(folder: Path, identity: Mapping[str, Any], num_samples: int, source: Mapping[str, Any]) -> None:
    """Write the manifest, or check that the folder holds the same set and note a larger count.

    Raises SynthkdError where it holds another recipe's set; the message names the first difference.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = dict(identity)
    look = identity.pop("look", None)  # decided, not declared: it stands in the decoder note
    if (folder / MANIFEST).exists():
        have = read_manifest(folder)
        _refuse_other(folder, have, identity)
        decided = decoder_note(have).get("chosen")
        if None not in (decided, look) and decided != look:
            raise SynthkdError(
                f"{folder}: its guidance looks through {decided!r}, as its manifest decided, not through {look!r}; "
                "go on with the command that began it, or synthkd.dfkd.draw_set"
            )
        num_samples = max(num_samples, int(have["num_samples"]))
        if num_samples == have["num_samples"]:
            return
    elif next(folder.glob("shard-*"), None) is not None:
        raise SynthkdError(f"{folder}: holds shards but no {MANIFEST}; choose another folder")
    manifest = {"format": FORMAT, **identity, "num_samples": num_samples, "source": dict(source)}
    if (folder / MANIFEST).exists():
        manifest[CHECKPOINTS] = have.get(CHECKPOINTS, {})
        manifest |= {DECODER: have[DECODER]} if DECODER in have else {}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def round_folder(folder: Path, round_: int) -> Path:
    """Where a set keeps what its guidance had learned when a round began."""
    return folder / "rounds" / f"round-{round_}"


def found_checkpoint(folder: Path, round_: int) -> str | None:
    """SHA-256 over the files of a round's checkpoint, its card among them; None where one is missing."""
    return _files_digest(round_folder(folder, round_), CHECKPOINT_FILES)


def _files_digest(where: Path, names: Iterable[str]) -> str | None:
    digest = hashlib.sha256()
    for name in names:
        if not (where / name).is_file():
            return None
        digest.update(hashlib.sha256((where / name).read_bytes()).digest())
    return digest.hexdigest()


def checkpoint_digest(manifest: Mapping[str, Any], round_: int) -> str | None:
    """SHA-256 of the checkpoint that a round was drawn with, as the manifest has it; None before it is trained."""
    noted = manifest.get(CHECKPOINTS)
    found = noted.get(str(round_)) if isinstance(noted, Mapping) else None
    return found if isinstance(found, str) else None


def note_checkpoint(folder: Path, round_: int, sha256: str) -> None:
    """Write a round's checkpoint digest into the manifest."""
    manifest = read_manifest(folder)
    manifest[CHECKPOINTS] = {**manifest.get(CHECKPOINTS, {}), str(round_): sha256}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def decoder_folder(folder: Path) -> Path:
    """Where a set keeps the guidance decoder that was fitted for it."""
    return folder / DECODER


def found_decoder(folder: Path) -> str | None:
    """SHA-256 over the files of a set's own decoder, its card among them; None where one is missing."""
    return _files_digest(decoder_folder(folder), DECODER_FILES)


def decoder_note(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the guidance decoder: asked, chosen, sha256, cosine; {} where it says nothing.

    Raises SynthkdError for a note that is not one of ours.
    """
    note = manifest.get(DECODER, {})
    kinds = {"asked": str, "chosen": str, "sha256": str, "cosine": float, "threshold": float}
    table = isinstance(note, Mapping)
    if not table or not all(isinstance(note.get(name, kind()), kind) for name, kind in kinds.items()):
        wanted = "a table of the texts asked, chosen, sha256 and the numbers cosine, threshold"
        raise SynthkdError(f"{MANIFEST}: decoder is {note!r:.100}; expected {wanted}")
    if "chosen" in note and not {"asked", "threshold"} <= set(note):
        raise SynthkdError(f"{MANIFEST}: decoder says what was chosen, but not what was asked, or no threshold")
    return dict(note)


def note_decoder(folder: Path, note: Mapping[str, Any]) -> None:
    """Write what is known of the guidance decoder into the manifest."""
    manifest = {**read_manifest(folder), DECODER: dict(note)}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def _refuse_other(folder: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    if have["fingerprint"] == want["fingerprint"] and have["model_sha256"] == want["model_sha256"]:
        return
    parts = ("recipe", "seed", "guidance", "model_sha256")
    ours, theirs = (flatten({p: side[p] for p in parts}) for side in (want, have))
    for name in sorted(ours.keys() | theirs.keys(), key=lambda n: (parts.index(n.partition(".")[0]), n)):
        if ours.get(name) != theirs.get(name):
            there, here = (str(side.get(name))[:60] for side in (theirs, ours))
            raise SynthkdError(
                f"{folder}: holds another recipe's set ({name} is {there} there, {here} here); choose another --out"
            )
    raise SynthkdError(f"{folder}: holds another recipe's set; choose another --out")
