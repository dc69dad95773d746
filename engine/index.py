"""What a set's folder says of itself beside its rows: manifest, environments, checkpoints. Plain JSON, atomically."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from synthkd.engine.environment import environment_key
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically
from synthkd.engine.untrusted import open_plain, parse_note, read_plain

MANIFEST, ENVIRONMENTS = "manifest.json", "environments"
CHECKPOINTS, CHECKPOINT_FILES = "checkpoints", ("student.toml", "student.safetensors")
DECODER, DECODER_FILES = "decoder", ("decoder.json", "decoder.safetensors")
FORMAT = 2
MAX_SAMPLES = 10**12
_MAX_ENVIRONMENT = 2**20  # bytes


def note_environment(folder: Path, detail: Mapping[str, Any]) -> str:
    """The key of an environment; what it stands for is kept in the folder's environments/KEY.json."""
    key = environment_key(dict(detail))
    path = folder / ENVIRONMENTS / f"{key}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(detail, indent=2, sort_keys=True) + "\n", shared=True)
    return key


def read_environments(folder: Path) -> dict[str, dict[str, Any]]:
    """What the keys in a folder's rows stand for; without those that cannot be read, since images do not hang on it."""
    found = {}
    for path in sorted((folder / ENVIRONMENTS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError, SynthkdError):
            detail = parse_note(read_plain(path, folder, _MAX_ENVIRONMENT))
            if isinstance(detail, dict):
                found[path.stem] = detail
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a set; raises SynthkdError where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / "shards" / MANIFEST).is_file():
            raise SynthkdError(f"{folder}: no {MANIFEST}; this is a run, its set is {folder / 'shards'}")
        raise SynthkdError(f"{folder}: no {MANIFEST} there; expected the folder of a set, written by `synthkd synth`")
    try:
        data: dict[str, Any] = parse_note(read_plain(path, folder))
        if data["format"] != FORMAT:
            raise SynthkdError(f"{path}: format {data['format']!r}; this version reads {FORMAT}")
        texts = data["fingerprint"], data["recipe"]["image_format"], data["model_sha256"]
        if not all(isinstance(text, str) for text in texts) or not isinstance(data["guidance"], dict):
            raise TypeError("fingerprint, model_sha256 or image_format is no text, or guidance no table")
        if type(data["seed"]) is not int or type(data["num_samples"]) is not int:
            raise TypeError("seed or num_samples is not a whole number")
        if not (0 <= data["seed"] < 2**63 and 1 <= data["num_samples"] <= MAX_SAMPLES):
            raise ValueError("seed or num_samples is out of its range")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SynthkdError(f"{path}: not a synthkd manifest ({repr(error)[:300]})") from error
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
        with open(open_plain(where / name, where), "rb") as f:  # noqa: PTH123
            digest.update(hashlib.file_digest(f, "sha256").digest())
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
