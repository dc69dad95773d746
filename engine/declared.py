"""What a network was trained on, as declared beside its weights; a prior that has seen the teacher's data is refused.

A data set has a name of parts, from the whole to the part: `pacs`, `pacs/sketch`, `pacs/sketch/train`. Two names have
images in common where one begins with the other, where one has a split where they part (who has seen `cifar10/test`
has seen the teacher's data set, and what its students are scored on; `pacs/train` is of all domains), and where the
data sets, or what they hold, are known to share some. `cifar100/without-cifar10` says that what was shared was taken
out. A declaration is a promise of whoever trained; nothing here can check it, and no option overrules it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically
from synthkd.engine.untrusted import parse_note, read_plain

DECLARATION = "trained_on.json"
NOT_DECLARED = "not declared"
FORMAT = 1
MAX_DECLARATION = 2**20  # bytes
_MOST_NAMES, _LONGEST = 256, 200
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*")
_WITHOUT = "without-"
_SPLITS = {"train", "test", "val", "valid", "validation", "dev", "trainval", "extra"}
_SAYS_NOTHING = {"unknown", "none", "null", "nan", "na", "n.a.", "undeclared"}
_ALIASES = {
    "imagenet": "imagenet1k", "ilsvrc2012": "imagenet1k", "imagenet22k": "imagenet21k", "80mtinyimages": "tinyimages",
    **dict.fromkeys(("imagenet32", "imagenet64", "imagenet32x32", "imagenet64x64"), "imagenet1k"),
}  # fmt: skip
# Data sets that hold others: who trained on the left has seen what is on the right.
_HOLDS = {
    "tinyimages": ("cifar10", "cifar100", "cifar10.1"),
    "cinic10": ("cifar10",),
    "imagenet21k": ("imagenet1k",),
    "imagenet1k": ("tinyimagenet", "miniimagenet", "imagenet100", "imagenette", "imagewoof"),
    "qmnist": ("mnist",),
}  # fmt: skip
# Data sets that share some images without one holding the other. Of CIFAR-100 two images are bit for bit in CIFAR-10;
# PACS took its sketches from TU-Berlin and Sketchy, its photos from Caltech-256 and Sketchy (Li et al. 2017, sec. 3).
_SHARE = (
    ("cifar100", "cifar10"), ("cinic10", "imagenet21k"), ("cinic10", "imagenet1k"), ("emnist", "mnist"),
    ("pacs/sketch", "tuberlin"), ("pacs/sketch", "sketchy"), ("pacs/photo", "sketchy"), ("pacs/photo", "caltech256"),
)  # fmt: skip
_SHARED = [(tuple(one.split("/")), tuple(other.split("/"))) for one, other in _SHARE]


class OverlapError(SynthkdError):
    """A network has seen the data that a teacher declares as its own."""


def check_names(where: str, names: Any) -> tuple[str, ...]:
    """Names of data sets, at least one; raises SynthkdError, which begins with `where`, for anything else."""
    if not isinstance(names, (list, tuple)):
        raise _no_names(where, names)
    if not 0 < len(names) <= _MOST_NAMES:
        raise SynthkdError(
            f"{where} has {len(names)} names; expected 1 to {_MOST_NAMES}, or no such field where it is not known"
        )
    for name in names:
        if not is_name(name):
            raise _no_names(where, name)
        if name in _SAYS_NOTHING:
            raise SynthkdError(f"{where} says {name!r}; leave the field out where it is not known")
    return tuple(names)


def is_name(value: object) -> bool:
    """Whether a value is the name of a data set, or of a part of one."""
    fits = isinstance(value, str) and len(value) <= _LONGEST and not value.startswith(_WITHOUT)
    return fits and _NAME.fullmatch(str(value)) is not None


def _no_names(where: str, found: object) -> SynthkdError:
    shown = repr(found[:_LONGEST] if isinstance(found, str) else found)[:100]
    return SynthkdError(
        f'{where} is {shown}; expected a list of names of data sets in lower case, such as ["pacs/sketch/train"]'
    )


def overlap(ours: Iterable[str], theirs: Iterable[str]) -> tuple[str, str] | None:
    """The first pair of names, one of each side, that mean common images or one data set; None where there is none."""
    known = list(theirs)
    return next(((one, other) for one in ours for other in known if _in_common(one, other)), None)


def _in_common(one: str, other: str) -> bool:
    (a, a_lacks), (b, b_lacks) = _parts(one), _parts(other)
    if a_lacks.intersection(b) or b_lacks.intersection(a):
        return False
    lacks = a_lacks | b_lacks
    known = [(x, y) for x, y in _SHARED if lacks.isdisjoint((*x, *y))]
    return any(_meet(x, y) or _share(x, y, known) for x in _held(a, lacks) for y in _held(b, lacks))


def _parts(name: str) -> tuple[tuple[str, ...], set[str]]:
    """The parts of a name, spelt one way, and the names of what was taken out, with what that holds."""
    spelt = name.split("/")
    first, *rest = (_spelling(part) for part in spelt if not part.startswith(_WITHOUT))
    out = [_spelling(part.removeprefix(_WITHOUT)) for part in spelt if part.startswith(_WITHOUT)]
    named = {_ALIASES.get(part, part) for part in out} - _SPLITS
    return (_ALIASES.get(first, first), *rest), named.union(*(_held_by(part) for part in named))


def _spelling(part: str) -> str:
    """`cifar-10` and `cifar_10` are `cifar10`."""
    return part.replace("-", "").replace("_", "")


def _meet(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether one begins with the other, or one names a split where they part."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place > 0 and (x in _SPLITS or y in _SPLITS)
    return True


def _share(a: Sequence[str], b: Sequence[str], known: Iterable[tuple[Sequence[str], Sequence[str]]]) -> bool:
    """Whether both are of data sets that are known to share images."""
    return any((_meet(x, a) and _meet(y, b)) or (_meet(x, b) and _meet(y, a)) for x, y in known)


def _held(name: tuple[str, ...], lacks: set[str]) -> list[tuple[str, ...]]:
    """A name, and the data sets that its whole holds, but for those that were taken out."""
    return [name, *((held,) for held in _held_by(name[0]) if held not in lacks)]


def _held_by(whole: str) -> Iterator[str]:
    for name in _HOLDS.get(whole, ()):
        yield name
        yield from _held_by(name)


def check_apart(what: str, ours: Sequence[str] | None, teacher: Sequence[str] | None) -> None:
    """Raise OverlapError where `what` has seen data that the teacher declares as its own; None: nothing is declared."""
    found = overlap(ours or (), teacher or ())
    if found is not None:
        raise OverlapError(
            f"{what} declares that it has seen {found[0]!r}, and the teacher was trained on {found[1]!r}, which is the "
            "same data set or shares images with it: that is not data-free; use one that has not seen the teacher's "
            "data (no option allows it)"
        )


def in_words(names: Sequence[str] | None) -> str:
    """Names as one text, `not declared` for None."""
    return NOT_DECLARED if names is None else ", ".join(names)


def from_words(text: object) -> tuple[str, ...] | None:
    """The names of such a text; None for `not declared`, and for anything else."""
    names = tuple(text.split(", ")) if isinstance(text, str) and len(text) <= MAX_DECLARATION else ()
    return names if names and all(map(is_name, names)) else None


def declared_in(manifest: Mapping[str, Any]) -> dict[str, tuple[str, ...] | None] | None:
    """What a set's manifest says that each network declared when the set was begun; None where it says nothing."""
    source = manifest.get("source")
    said = source.get("declared") if isinstance(source, Mapping) else None
    return {str(who): from_words(text) for who, text in said.items()} if isinstance(said, Mapping) else None


def write_declaration(folder: Path, trained_on: Sequence[str], data_sha256: str) -> dict[str, str]:
    """Write trained_on.json into a model's folder; returns the SHA-256 of its weight files, which it holds too.

    data_sha256: of the images, where whoever declares has them; "" leaves it out.
    """
    names = check_names("trained_on", list(trained_on))
    files = sorted(folder.rglob("*.safetensors"))
    sums = {p.relative_to(folder).as_posix(): _sum_of(p) for p in files}
    data = {"data_sha256": data_sha256} if data_sha256 else {}
    told = {"format": FORMAT, "trained_on": list(names), **data, "sha256": sums}
    write_atomically(folder / DECLARATION, json.dumps(told, indent=2) + "\n")
    return sums


def read_declaration(folder: Path) -> tuple[str, ...] | None:
    """What a folder declares, None where it declares nothing. A link is followed: hubs keep files behind them.

    Raises SynthkdError for a declaration that cannot be read: a broken promise is none.
    """
    told = _told(folder)
    return None if told is None else check_names(f"{folder / DECLARATION}: trained_on", told.get("trained_on"))


def check_weights(folder: Path) -> None:
    """Raise SynthkdError where weights beside a declaration are not those whose SHA-256 it holds.

    What holds none, as one that was written by hand, says nothing of the files.
    """
    sums = (_told(folder) or {}).get("sha256", {})
    where = folder / DECLARATION
    if not isinstance(sums, dict) or len(sums) > _MOST_NAMES or not all(isinstance(v, str) for v in sums.values()):
        raise SynthkdError(f"{where}: sha256 is no table of at most {_MOST_NAMES} texts; write the declaration anew")
    for name, digest in sums.items():
        path = folder / name
        if path.suffix != ".safetensors" or ".." in path.parts or Path(name).is_absolute():
            raise SynthkdError(f"{where}: sha256 names {name[:100]!r}; expected .safetensors files of this folder")
        if not path.is_file() or _sum_of(path) != digest:
            raise SynthkdError(
                f"{where}: {name} is missing, or not the file that it declares; take the folder as it was written, or "
                "declare what these weights were trained on"
            )


def _sum_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _told(folder: Path) -> dict[str, Any] | None:
    """A folder's declaration, of this format; None where there is none."""
    path = folder / DECLARATION
    if not os.path.lexists(path):
        return None
    try:
        told = parse_note(read_plain(path, None, MAX_DECLARATION))
    except SynthkdError as error:
        raise SynthkdError(f"{path}: no plain file of at most {MAX_DECLARATION} bytes; write it anew") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SynthkdError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT or isinstance(told["format"], bool):
        raise SynthkdError(f"{path}: not of format {FORMAT}, which this version reads")
    return told
