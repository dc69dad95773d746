"""What runs that share a store learn once for all of them: the students of its rounds, and its guidance decoder.

Each is trained where it is first needed. Two machines that train the same one may get different bits; one of them is
the set's, and shards that were steered by the other one would be another set's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import (
    CHECKPOINT_FILES,
    CHECKPOINTS,
    DECODER,
    DECODER_FILES,
    checkpoint_digest,
    decoder_note,
    found_checkpoint,
    found_decoder,
)
from synthkd.engine.stores import Store
from synthkd.engine.untrusted import parse_note


def agreed(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a manifest says was learned, by name: `round-N` and `decoder-sha256` digests, `decoder-chosen` a kind."""
    rounds = manifest.get(CHECKPOINTS)
    numbers = [str(n) for n in rounds if str(n).isdecimal()] if isinstance(rounds, Mapping) else []
    found = {f"round-{n}": checkpoint_digest(manifest, int(n)) for n in numbers}
    note = decoder_note(manifest)
    found |= {f"decoder-{name}": note.get(name) for name in ("sha256", "chosen")}
    return {name: said for name, said in found.items() if said is not None}


def refuse_unlike(place: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise SynthkdError where two manifests of one set say that different things were learned."""
    ours, others = agreed(mine), agreed(theirs)
    for name in sorted(ours.keys() & others.keys()):
        if ours[name] != others[name]:
            raise _unlike(place, name, others[name], ours[name])


def settle(store: Store, manifest: Mapping[str, Any]) -> None:
    """Say in a store what was learned, first come, first served: of two runs at once, one alone goes on to draw.

    Raises SynthkdError where another run has said otherwise.
    """
    for name, said in sorted(agreed(manifest).items()):
        note = f"settled/{name}.json"
        if not store.create_exclusive(note, (json.dumps({"is": said}) + "\n").encode()):
            there = _said(store, note)
            if there != said:
                raise _unlike(store.url, name, there, said)


def learned(folder: Path, manifest: Mapping[str, Any]) -> list[tuple[list[str], bool]]:
    """(files, whether they are those that the manifest names) of each thing learned, relative to the folder."""
    found = []
    for name, said in agreed(manifest).items():
        if name.startswith("round-"):
            names = [f"rounds/{name}/{file}" for file in CHECKPOINT_FILES]
            found.append((names, found_checkpoint(folder, int(name.removeprefix("round-"))) == said))
        elif name == "decoder-sha256":
            found.append(([f"{DECODER}/{file}" for file in DECODER_FILES], found_decoder(folder) == said))
    return found


def _said(store: Store, note: str) -> str:
    data = store.read(note)
    try:
        found = parse_note(data or b"")
    except (ValueError, RecursionError):
        found = None
    return str(found.get("is")) if isinstance(found, dict) else "unreadable"


def _unlike(place: str, name: str, there: str, here: str) -> SynthkdError:
    what = f"the student of round {name.removeprefix('round-')}" if name.startswith("round-") else "guidance decoder"
    return SynthkdError(
        f"{place}: {what} is {there[:16]!a} there and {here[:16]!a} here, learned by two runs on different machines; "
        f"remove this run's spool and run it again, which takes over theirs (where nobody has that one any more, "
        f"remove settled/{name}.json there too)"
    )
