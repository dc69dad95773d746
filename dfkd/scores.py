"""A network's score on a test set, kept in a file: a run in many parts takes it once."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from synthkd.dfkd.cards import card_path, read_card
from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.evaluate import Score, evaluate
from synthkd.dfkd.teachers import Teacher, teacher_digest
from synthkd.engine.rows import write_atomically


def card_digest(reference: str) -> str:
    """SHA-256 of a card and of the files it names, wherever they lie; weights of a hub's folder are not among them.

    Raises SynthkdError for a card that cannot be read.
    """
    path = card_path(reference)
    card = read_card(path)
    files = [path, *(file for file in (card.weights, card.moments) if file is not None)]
    sums = [_file_digest(f, (told := f.stat()).st_size, told.st_mtime_ns) for f in files]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


@lru_cache(maxsize=16)
def _file_digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def kept_score(path: Path, reference: str, net: Teacher, data: LabelledImages) -> Score:
    """The score of a card's network, loaded, on a test set: what the file says, if it is of these very two.

    Else it is taken, and written there.
    """
    told = hashlib.sha256(repr(data.classes).encode())
    for tensor in (data.images, data.labels):
        told.update(tensor.contiguous().numpy().tobytes())
    sums = {"card": card_digest(reference), "network": teacher_digest(net), "test_set": told.hexdigest()}
    try:
        found = json.loads(path.read_text())
        if found["of"] == sums:
            return Score(**found["score"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    score = evaluate(net, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"of": sums, "score": score.to_dict()}) + "\n")
    return score
