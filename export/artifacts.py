"""Where built modules are kept: a folder each, whole or not there, found by everything that it depends on.

An artifact is `NAME-BACKEND-KEY/` with the backend's files and `manifest.json`. KEY hashes what decides whether it may
be used: weights, shapes, dtypes, options, library versions, processor. Artifacts that hold machine code (aoti,
tensorrt) are loaded only if this user made them: a keyed digest in the manifest says so.
"""

import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.export.errors import ExportError

FORMAT = 1
MANIFEST = "manifest.json"
_NOTES = ("training", "name_or_path", "config")
CODE = ("aoti", "tensorrt")  # backends whose files are machine code
_LIBRARIES = {
    "eager": ("torch",),
    "compile": ("torch",),
    "aoti": ("torch",),
    "onnx": ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("torch", "onnx", "onnxscript"),
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is, what it depends on, and how far it is from eager.

    parts: what the key hashes; signature: tensors in and out; structure: the nesting of the result; samples: whether
    each sample's result is its own; seconds: of each stage of the build; files: name -> size and SHA-256;
    verified: batch -> max_abs, relative, psnr.
    """

    name: str
    backend: str
    key: str
    parts: Mapping[str, Any]
    signature: Mapping[str, Any]
    structure: Any
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    verified: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    samples: bool = True
    maker: str = ""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def default_store() -> Path:
    """Where artifacts are kept if nothing else is said: $SYNTHKD_ARTIFACTS, or the user's cache folder."""
    said = os.environ.get("SYNTHKD_ARTIFACTS")
    return Path(said) if said else own_cache() / "artifacts"


def own_cache() -> Path:
    """This user's cache folder for this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synthkd"


def key_of(parts: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def weights_sha256(modules: Iterable[nn.Module]) -> str:
    """Over names, shapes, dtypes and bytes of all parameters and buffers, those that no file keeps as well."""
    digest = hashlib.sha256()
    for module in modules:
        named = [*module.named_parameters(), *module.named_buffers()]
        for name, tensor in sorted(named, key=lambda pair: pair[0]):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def state_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Classes and plain attributes of every module: what beside its tensors decides what a network computes.

    An adapter's scale is among them, a dict of numbers, and what is merged. Not what a library notes for itself: names
    with an underscore, where a network came from.
    """
    rows: list[Any] = []
    for module in modules:
        for name, part in module.named_modules():
            told = {n: v for n, v in sorted(vars(part).items()) if n[0] != "_" and n not in _NOTES and _plain(v)}
            rows.append([name, type(part).__qualname__, {n: str(v) for n, v in told.items()}])
    return rows


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(k, str) and isinstance(v, bool | int | float) for k, v in value.items())
    if isinstance(value, tuple | list):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def processor(device: torch.device) -> str:
    """What machine code depends on: a GPU's name and architecture, or the CPU's instruction set."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda: {torch.cuda.get_device_name(device)} sm_{major}{minor}"
    return f"{device.type}: {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def versions_for(backend: str) -> dict[str, str]:
    """Installed versions of the libraries that an artifact of a backend depends on, this package's own among them."""
    found = {}
    for name in (*_LIBRARIES[backend], "synthkd"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Slot:
    """The place of one artifact in a store."""

    def __init__(self, store: Path, name: str, backend: str, parts: Mapping[str, Any]) -> None:
        """parts: see `Manifest`; name: a word that starts the folder's name."""
        self.store, self.name, self.backend, self.parts = store, name, backend, json.loads(json.dumps(parts))
        self.key = key_of(self.parts)
        self.folder = store / f"{name}-{backend}-{self.key}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time builds it; the others wait and find it built. Raises ExportError, no such folder."""
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            handle = (self.store / f".lock-{self.folder.name}").open("w")
        except OSError as error:
            raise ExportError(f"artifacts folder {self.store}: cannot be written ({error.strerror})") from error
        with handle:
            _lock(handle)
            yield

    def found(self, trust: bool = False) -> Manifest | None:
        """The manifest of the artifact that is there; None where none is, or only a damaged one.

        Raises ExportError for one of machine code that somebody else made, unless it is trusted.
        """
        if not self.folder.exists():
            return None
        manifest, why_not = read_manifest(self.folder)
        if manifest is None or manifest.key != self.key:
            return None
        if why_not:
            return None
        check_maker(self.folder, manifest, trust)
        return manifest

    def why_new(self) -> str:
        """Why there is no such artifact: damaged, or what the most alike one of this name was made for; "" if none."""
        if self.folder.exists():
            return read_manifest(self.folder)[1] or "its key is another"
        rows = [_parsed(folder)[0] for folder in sorted(self.store.glob(f"{self.name}-{self.backend}-*"))]
        told = [differences(row.parts, self.parts) for row in rows if row is not None]
        return min((lines for lines in told if lines), key=len, default=[""])[0]

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """A folder to build in, which takes its place, whole, where nothing is raised; left-overs are swept first."""
        for old in self.store.glob(f".building-{self.folder.name}-*"):
            shutil.rmtree(old, ignore_errors=True)
        fresh = self.store / f".building-{self.folder.name}-{os.getpid()}"
        fresh.mkdir(parents=True)
        try:
            yield fresh
            _to_disk(fresh)
            if self.folder.exists():  # damaged, or it would have been used
                shutil.rmtree(self.folder)
            fresh.rename(self.folder)
            sync_folder(self.store)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """What changed, as lines `field: old -> new`."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{where}{name}.")
        elif before != after:
            lines.append(f"{where}{name}: {_short(before)} -> {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """With sizes and digests of the folder's files, and the maker's mark; it is the last file to be written."""
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _file_sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    unsigned = Manifest(**{**manifest.__dict__, "files": files, "maker": ""})
    mark = _mark(unsigned) if manifest.backend in CODE else ""
    signed = Manifest(**{**unsigned.__dict__, "maker": mark})
    (folder / MANIFEST).write_text(json.dumps(signed.to_dict(), indent=2, sort_keys=True) + "\n")
    return signed


def _parsed(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest of a folder, its files unseen, and why there is none."""
    try:
        data = json.loads((folder / MANIFEST).read_text())
        manifest = Manifest(**data)
        tables = (manifest.parts, manifest.signature, manifest.files, manifest.verified, manifest.seconds)
        if not all(isinstance(table, dict) for table in tables):
            return None, f"its {MANIFEST} cannot be read"
        _ = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in manifest.files.items()}
    except OSError:
        return None, f"no {MANIFEST} in it"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, f"its {MANIFEST} cannot be read"
    return manifest, ""


def read_manifest(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest of a folder, and what is wrong with it or with the files, "" for nothing."""
    manifest, why_not = _parsed(folder)
    if manifest is None:
        return None, why_not
    files = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in manifest.files.items()}
    if manifest.format != FORMAT:
        return None, f"it is of format {manifest.format}; this version reads {FORMAT}"
    if manifest.key != key_of(manifest.parts):
        return manifest, "its key does not belong to what it says it was made for"
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return manifest, f"it names a file outside ({name})"
        if not path.is_file() or path.stat().st_size != size or _file_sha256(path) != digest:
            return manifest, f"{name} is missing or damaged"
    return manifest, ""


def check_maker(folder: Path, manifest: Manifest, trust: bool) -> None:
    """Raise ExportError for machine code that this user has not made, unless it is trusted."""
    if manifest.backend not in CODE or trust:
        return
    bare = Manifest(**{**manifest.__dict__, "maker": ""})
    if not hmac.compare_digest(manifest.maker, _mark(bare)):
        raise ExportError(
            f"artifact {folder.name}: it holds machine code, and this user has not made it; remove it, or pass "
            "--trust-artifacts (trust=True) if you know who has"
        )


def check_key() -> None:
    """Raise ExportError, before minutes are spent, where this user's key cannot be had."""
    try:
        _secret()
    except OSError as error:
        raise ExportError(f"artifacts: the key that marks what you made cannot be kept ({error})") from error


def _mark(manifest: Manifest) -> str:
    text = json.dumps(manifest.to_dict(), sort_keys=True).encode()
    return hmac.new(_secret(), text, hashlib.sha256).hexdigest()


def _secret() -> bytes:
    """This user's key, made once; it is not beside the artifacts, so that a copy of those does not carry it."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "synthkd"
    path = home / "artifacts.key"
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    home.mkdir(parents=True, exist_ok=True)
    fresh = home / f".artifacts.key-{secrets.token_hex(8)}"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(secrets.token_bytes(32))
    try:
        os.link(fresh, path)  # the first of several processes wins
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_bytes()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _lock(handle: Any) -> None:
    """Held until the file is closed; nothing where the system has no such locks."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def described(values: Sequence[Any]) -> str:
    """SHA-256 over the text of plain values."""
    return hashlib.sha256(json.dumps(list(values), sort_keys=True, default=str).encode()).hexdigest()
