"""The dataset card of a set: `README.md`, with the front matter that the Hugging Face hub reads. A function of the set.

Names and prompts come from files: they stand in fences and code spans, never as Markdown, HTML or YAML.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthkd.engine.columns import index_digest, is_complete, set_plan, shard_columns
from synthkd.engine.declared import NOT_DECLARED, declared_in, in_words
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import flatten, read_environments, read_manifest
from synthkd.engine.models import EMBEDDED
from synthkd.engine.rows import read_index, write_atomically
from synthkd.engine.shards import disk_errors
from synthkd.engine.table import MISSING, TABLE, has_parquet, is_fresh, write_table
from synthkd.engine.untrusted import open_plain

CARD = "README.md"
MARK = "<!-- This card is written by synthkd, anew with the set; without this line it is yours and is left alone. -->"
UNKNOWN = "unknown: ask the prior's authors"
_CLASSES_SHOWN = 1000
_STATE = re.compile(rb"<!-- of index ([0-9a-f]{16}), counts ([0-9a-f]{16}) -->")
_READ = 2**16  # bytes of another project's file that are looked at
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories that show nothing, or break a line
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,39}")
_log = logging.getLogger("synthkd")


@dataclass
class Tally:
    """What a card counts in a pass over a set: images by label, and by the environment that drew them."""

    labels: Counter[int] = field(default_factory=Counter)
    environments: Counter[str] = field(default_factory=Counter)
    repaired: int = 0

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of what was counted."""
        return _digest([sorted(self.labels.items()), sorted(self.environments.items()), self.repaired])

    @classmethod
    def of(cls, folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> "Tally":
        """Count the finished images of a set; on_shard: given those of each shard."""
        out = cls()
        for columns in shard_columns(folder):
            out.labels.update(columns.label)
            for group in columns.groups:
                for count, key, again in group.runs:
                    out.environments[key] += count
                    out.repaired += count * again
            on_shard(len(columns))
        return out


def describe_set(folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> list[Path]:
    """Write table and card of a complete set, each where it is not there or not of its index; returns what was written.

    Nothing is written where shards are missing. Without pyarrow there is no table, and a line in the log says so.
    on_shard: given the images of each shard for the table.
    """
    if not is_complete(folder):
        return []
    with disk_errors(folder):
        if has_parquet():
            written = [] if is_fresh(folder) else [write_table(folder, on_shard)]
        else:
            written = []
            _log.info("no %s is written: %s", TABLE, MISSING)
        if _state(folder)[:1] != (_digest_of_index(folder),):
            written += [path for path in [write_card(folder)] if path]
    return written


def card_problems(folder: Path) -> list[str]:
    """A line where a set's card is ours, and tells of another state of the set: of other shards, or other counts."""
    if not _is_ours(folder) or not read_index(folder):
        return []
    if _state(folder) == (_digest_of_index(folder), Tally.of(folder).digest):
        return []
    return [f"{CARD}: stale, it tells of another state of the set; run `synthkd index {folder}`"]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _digest_of_index(folder: Path) -> str:
    return index_digest(read_index(folder))[:16]


def _card_head(folder: Path) -> bytes:
    """The first bytes of README.md; empty where it is no plain file of the set."""
    try:
        with open(open_plain(folder / CARD, folder), "rb") as f:  # noqa: PTH123
            return f.read(_READ)
    except (OSError, SynthkdError):
        return b""


def _is_ours(folder: Path) -> bool:
    return MARK.encode() in _card_head(folder)


def _state(folder: Path) -> tuple[str, ...]:
    """Digests of the index and the counts that the card was made of; () where it names none."""
    found = _STATE.search(_card_head(folder))
    return tuple(part.decode() for part in found.groups()) if found else ()


def write_card(folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> Path | None:
    """Write a set's card as a whole; None where README.md is the user's own, which stays as it is.

    on_shard: given the images of each shard; what it raises ends the writing.
    """
    path = folder / CARD
    if os.path.lexists(path) and not _is_ours(folder):
        return None
    if not read_index(folder):
        raise SynthkdError(f"{folder}: holds no finished shard; finish the set with the command that began it")
    write_atomically(path, card_text(folder, Tally.of(folder, on_shard)), shared=True)
    return path


def card_text(folder: Path, tally: Tally) -> str:
    """The card of a set; raises SynthkdError where its manifest is none of ours."""
    manifest = read_manifest(folder)
    recipe = set_plan(manifest).recipe.to_dict()
    licence = prior_licence(_source(manifest, "model"))
    parts = [
        _front(tally, licence, len(recipe["classes"])),
        f"{MARK}\n<!-- of index {_digest_of_index(folder)}, counts {tally.digest} -->",
        *_what(manifest, recipe, tally),
        *_origin(manifest, licence),
        *_use(manifest, recipe),
        *_counts(recipe["classes"], tally),
        *_environments(folder, tally),
        "## Recipe",
        fence(json.dumps(recipe, indent=2, sort_keys=True, ensure_ascii=False), "json"),
    ]
    return "\n\n".join(parts) + "\n"


def prior_licence(model: str) -> str:
    """The licence of a prior as its folder states it: an identifier, a LICENSE file's first line, or UNKNOWN."""
    if model.startswith(EMBEDDED):
        return "apache-2.0"
    stated = _stated(_head(model, "README.md").splitlines())
    if _LICENCE.fullmatch(stated):
        return stated.lower()
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        lines = [line.strip() for line in _head(model, name).splitlines() if line.strip()]
        if lines:
            return plain(lines[0])[:80]
    return UNKNOWN


def _stated(lines: Sequence[str]) -> str:
    """`license:` in a card's front matter; empty where it says nothing."""
    if not lines or lines[0].rstrip() != "---":
        return ""
    front = itertools.takewhile(lambda line: line.rstrip() != "---", lines[1:])
    return next((line.partition(":")[2].strip(" \t'\"") for line in front if line.startswith("license:")), "")


def _head(model: str, name: str) -> str:
    """The first bytes of a file of the model's folder; empty where there is none."""
    if not model:
        return ""
    try:
        with open(open_plain(Path(model) / name, None), "rb") as f:  # noqa: PTH123
            return f.read(_READ).decode("utf-8", "replace")
    except (OSError, ValueError, SynthkdError):
        return ""


def plain(text: str) -> str:
    """One line without control characters."""
    return " ".join("".join(" " if unicodedata.category(c) in _HIDDEN else c for c in text).split())


def code(value: object) -> str:
    """A value as a code span that a table cell can hold."""
    text = plain(str(value)).replace("|", "\\|") or " "
    ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fence(text: str, kind: str) -> str:
    """Text as a fenced block that nothing within it can end."""
    text = "".join(json.dumps(c)[1:-1] if c != "\n" and unicodedata.category(c) in _HIDDEN else c for c in text)
    ticks = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{ticks}{kind}\n{text}\n{ticks}"


def rows_of(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _source(manifest: Mapping[str, Any], name: str) -> str:
    source = manifest.get("source")
    value = source.get(name) if isinstance(source, Mapping) else None
    return value if isinstance(value, str) else ""


def _declared(manifest: Mapping[str, Any], name: str) -> str:
    """What a network declares that it was trained on, as the set's manifest has it."""
    return in_words((declared_in(manifest) or {}).get(name))


def _others(manifest: Mapping[str, Any]) -> list[str]:
    """What took part beside prior and teacher, as the manifest calls it."""
    return [name for name in declared_in(manifest) or {} if name not in ("prior", "teacher")]


def _named(reference: str) -> str:
    """A model reference without the folders of the machine it lay on."""
    return re.split(r"[/\\]", reference.rstrip("/\\"))[-1] if re.match(r"[/~.]|[A-Za-z]:\\", reference) else reference


def size_category(count: int) -> str:
    """The hub's word for a number of images."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    if count < 1000:
        return "n<1K"
    above = [i for i in range(len(names)) if count > 10 ** (i + 3)]
    last = above[-1] if above else 0
    return f"n>{names[-1]}" if last == len(names) - 1 else f"{names[last]}<n<{names[last + 1]}"


def _front(tally: Tally, licence: str, classes: int) -> str:
    total = tally.labels.total()
    lines = [
        "---",
        f'license: "{licence if _LICENCE.fullmatch(licence) else "unknown"}"',
        f'pretty_name: "Synthetic images, {total} in {classes} classes, drawn by synthkd"',
        "task_categories:\n- image-classification",
        "annotations_creators:\n- machine-generated",
        f"size_categories:\n- {size_category(total)}",
        "tags:\n- synthetic\n- knowledge-distillation\n- webdataset",
        'configs:\n- config_name: default\n  data_files: "shard-*.tar"',
    ]
    return "\n".join([*lines, "---"])


def _what(manifest: Mapping[str, Any], recipe: Mapping[str, Any], tally: Tally) -> list[str]:
    total, classes = tally.labels.total(), len(recipe["classes"])
    size = f"{recipe['width']} x {recipe['height']}"
    drawn = "a latent diffusion model"
    drawn += ", steered by a trained classifier (the teacher)," if recipe["guidance"]["scale"] > 0 else ""
    if manifest["guidance"].get("kind", "diffdfkd") != "diffdfkd":
        drawn = f"the method {code(manifest['guidance']['kind'])}"
    text = f"{total:,} labelled images of {size} pixels in {classes:,} classes, drawn by {drawn} without any image "
    text += "that the teacher was trained on. A label says which class was asked for; nobody has looked at the images."
    if NOT_DECLARED in (_declared(manifest, name) for name in ("prior", "teacher", *_others(manifest))):
        text += " Whether the prior had seen such images in its own training is not declared."
    if recipe["previews"]:
        text += " Beside each image its shard holds previews of it, as samples of their own; the counts leave them out."
    return [f"# {total:,} synthetic images in {classes:,} classes", text]


def _origin(manifest: Mapping[str, Any], licence: str) -> list[str]:
    guidance = manifest["guidance"]
    facts = {
        "prior": _named(_source(manifest, "model")) or "not recorded",
        "prior trained on": _declared(manifest, "prior"),
        "prior's licence": licence,
        "prior's SHA-256": manifest["model_sha256"],
        "teacher": _named(_source(manifest, "teacher")) or "not recorded",
        "teacher trained on": _declared(manifest, "teacher"),
        **{f"{plain(name)} trained on": _declared(manifest, name) for name in _others(manifest)},
        "teacher's SHA-256": guidance.get("teacher_sha256", "no teacher took part"),
        "seed": manifest["seed"],
        "fingerprint": manifest["fingerprint"],
        "format": manifest["format"],
        **{f"guidance {code(name)}": value for name, value in flatten(guidance).items() if name != "teacher_sha256"},
    }
    note = "The licence is the prior's, as its own folder states it. Whether it, or the teacher's terms, bind these "
    note += "images is for you to find out before you pass them on."
    return ["## Where it comes from", rows_of(["field", "value"], [[k, code(v)] for k, v in facts.items()]), note]


def _use(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    suffix, first = recipe["image_format"], "000000000"
    load = f"""import datasets

images = datasets.load_dataset("SET")  # the folder, or its name on the hub

import webdataset

images = webdataset.WebDataset("shard-{{000000..LAST}}.tar").decode("pil").to_tuple("{suffix}", "json")

from pathlib import Path
from synthkd.dfkd import open_set  # labels and digests checked

source = open_set(Path("SET"))

import pandas

rows = pandas.read_parquet("SET/index.parquet")"""
    return [
        "## Intended use",
        "Training and distilling image classifiers where the teacher's training data cannot be had; research on "
        "synthetic training sets.",
        "## Limits",
        "The images are synthetic. They show what the prior can draw and what the teacher responds to: the biases and "
        "mistakes of both are in them, and a label may be wrong. They are no evidence about people, places or events, "
        "no benchmark (score on real images), and no stand-in for data that a safety-critical or medical system needs. "
        "Do not use them to identify persons, and do not present them as photographs.",
        "## Loading",
        fence(load, "python"),
        f"Members of a shard: `KEY.{suffix}` and `KEY.json` (label, class, prompt, seed, group, losses, and the "
        f"teacher's logits where it took part). `{TABLE}` has a row an image: label, class, confidence, losses, and "
        "its place in a shard (`offset`, `size`). `manifest.json` and `rows/` are what the set is checked against.",
        "## Drawing an image again",
        "An image is a function of recipe, seed and its group. On a processor and libraries as below the bytes agree:",
        fence(f"synthkd verify SET\nsynthkd replay SET --id {int(first)} --out {first}.{suffix}", "sh"),
    ]


def _counts(classes: Sequence[str], tally: Tally) -> list[str]:
    rows = [[i, code(name), f"{tally.labels[i]:,}"] for i, name in enumerate(classes[:_CLASSES_SHOWN])]
    more = len(classes) - len(rows)
    rest = [f"{more:,} more classes: count them in `{TABLE}`."] if more else []
    return ["## Images per class", rows_of(["label", "class", "images"], rows), *rest]


def _environments(folder: Path, tally: Tally) -> list[str]:
    known = read_environments(folder)
    rows = []
    for key, count in sorted(tally.environments.items()):
        told = ", ".join(f"{name}: {value}" for name, value in sorted(flatten(known.get(key, {})).items()))
        rows.append([code(key), f"{count:,}", code(told or "not described")])
    text = f"{tally.repaired:,} images were drawn again by `synthkd repair`." if tally.repaired else ""
    return ["## Where it was drawn", rows_of(["environment", "images", "what it is"], rows), *([text] if text else [])]
