"""A set's table of images as one Parquet file, `index.parquet`: made from `rows/` alone, checked, and asked.

The bytes are a function of the set's content and of pyarrow's version: no times, no order of writing.
"""

import json
import logging
import math
import operator
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from synthkd.engine.columns import LOSSES, ShardColumns, first_losses, index_digest, shard_columns
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.index import read_manifest
from synthkd.engine.rows import ShardRow, read_index
from synthkd.export.artifacts import sync_folder

TABLE = "index.parquet"
GROUP_ROWS = 2**16  # rows of a row group: what is in memory at a time
MISSING = "pyarrow is not installed: pip install 'synthkd[parquet]'"
_NOTE = b"synthkd"
_OWN = ("key", "id", "label", "confidence", "offset", "size", "digest")
_LARGEST_GROUP = 2**28  # bytes, unpacked
_SHOWN = 10  # problems of a table that are named one by one
_log = logging.getLogger("synthkd")

OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_OPERATOR = re.compile("|".join(OPERATORS))  # the leftmost one; longer ones come first


class Condition(NamedTuple):
    """What rows are asked for: a column, one of `OPERATORS`, a value."""

    column: str
    operator: str
    value: str | int | float | bool


class _NewLossError(Exception):
    """A term that no first group of a shard has."""


def has_parquet() -> bool:
    """Whether tables can be written and read here."""
    return find_spec("pyarrow") is not None


def _pyarrow() -> Any:
    """The modules pyarrow and pyarrow.parquet; raises SynthkdError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise SynthkdError(MISSING) from error
    return pyarrow


def _fields(losses: Sequence[str]) -> dict[str, str]:
    """Columns and their types, in the table's order."""
    own = {
        "key": "string", "id": "int64", "label": "int32", "class": "string", "seed": "int64", "round": "int32",
        "group": "int64", "attempt": "int32", "confidence": "double",
    }  # fmt: skip
    place = {
        "shard": "string", "offset": "int64", "size": "int64", "digest": "string", "environment": "string",
        "repaired": "bool",
    }  # fmt: skip
    return own | {f"{LOSSES}{name}": "double" for name in losses} | place


class _Source:
    """A set's rows as Arrow tables of GROUP_ROWS rows: what is written, and what a file is compared with."""

    def __init__(
        self, folder: Path, losses: set[str] | None = None, on_shard: Callable[[int], None] = lambda _: None
    ) -> None:
        self.on_shard = on_shard
        self.pa, self.folder, self.index = _pyarrow(), folder, read_index(folder)
        self.manifest = read_manifest(folder)
        self.losses = sorted(first_losses(folder, self.index) if losses is None else losses)
        note = {
            "digest": index_digest(self.index),
            "fingerprint": self.manifest["fingerprint"],
            "format": self.manifest["format"],
            "samples": sum(row.samples for row in self.index.values()),
        }
        fields = [(name, self.pa.type_for_alias(kind)) for name, kind in _fields(self.losses).items()]
        self.schema = self.pa.schema(fields, metadata={_NOTE: json.dumps(note, sort_keys=True)})
        self.note: dict[str, Any] = note
        self.seen: set[str] = set()  # terms that the rows had so far

    def tables(self) -> Iterator[Any]:
        """Tables of GROUP_ROWS rows, the last one shorter; raises _NewLossError for a column that the schema lacks."""
        held: list[Any] = []
        count = 0
        for columns in shard_columns(self.folder, self.index):
            held.append(self._table(columns))
            count += len(columns)
            self.on_shard(len(columns))
            while count >= GROUP_ROWS:
                whole = self.pa.concat_tables(held)
                yield whole.slice(0, GROUP_ROWS).combine_chunks()
                held, count = [whole.slice(GROUP_ROWS).combine_chunks()], count - GROUP_ROWS
        if count:
            yield self.pa.concat_tables(held).combine_chunks()

    def _table(self, columns: ShardColumns) -> Any:
        if columns.losses.keys() - set(self.losses):
            raise _NewLossError(*columns.losses)
        self.seen |= columns.losses.keys()
        pa, recipe, count = self.pa, self.manifest["recipe"], len(columns)
        rounds = _rounds(recipe, columns)
        values: dict[str, Any] = {
            **{name: getattr(columns, name) for name in _OWN},
            **{f"{LOSSES}{name}": columns.losses.get(name, [None] * count) for name in self.losses},
            **{name: columns.spread(name) for name in ("group", "attempt", "environment", "repaired")},
            "class": pa.array(recipe["classes"], pa.string()).take(pa.array(columns.label, pa.int32())),
            "seed": [self.manifest["seed"]] * count,
            "round": rounds,
            "shard": [columns.file] * count,
        }
        try:
            arrays = [pa.array(values[field.name], field.type) for field in self.schema]
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise SynthkdError(f"{self.folder}: rows of {columns.file} are not a synthkd set's ({error})") from error
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _rounds(recipe: Mapping[str, Any], columns: ShardColumns) -> list[int]:
    """The round of each image, as `Recipe.round_of` has it."""
    last, per_round = recipe.get("rounds", 1) - 1, recipe.get("groups_per_round", 0)
    size = per_round or recipe.get("groups_per_shard", 1)
    return [r for g in columns.groups for r in [min(g.group // size, last)] * g.kept]


def write_table(folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> Path:
    """Write `index.parquet` of a set's finished shards, as a whole or not at all; returns its path.

    A row a finished image, by id; a loss that a group does not have is null. on_shard: given the images of each shard;
    what it raises ends the writing. Raises SynthkdError where pyarrow is
    missing, no shard is finished, or rows are damaged.
    """
    source = _Source(folder, on_shard=on_shard)
    if not source.index:
        raise SynthkdError(f"{folder}: holds no finished shard; finish the set with the command that began it")
    temporary = folder / f"{TABLE}.{secrets.token_hex(4)}.tmp"
    try:
        try:
            _write(source, temporary)
        except _NewLossError:
            names = {name for columns in shard_columns(folder, source.index) for name in columns.losses}
            _write(_Source(folder, names), temporary)
        temporary.replace(folder / TABLE)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
    return folder / TABLE


def _write(source: _Source, path: Path) -> None:
    repeated = ["class", "seed", "round", "shard", "environment", "repaired", "label", "group", "attempt"]
    with path.open("wb") as f:
        with source.pa.parquet.ParquetWriter(
            f,
            source.schema,
            compression="zstd",
            use_dictionary=repeated,
            write_page_checksum=True,
            write_statistics=["id"],
            version="2.6",
        ) as writer:
            for table in source.tables():
                writer.write_table(table, row_group_size=GROUP_ROWS)
        f.flush()
        os.fsync(f.fileno())


class _File:
    """An opened table whose footer is ours; raises SynthkdError for any other file."""

    def __init__(self, folder: Path) -> None:
        self.pa, self.path = _pyarrow(), folder / TABLE
        if not self.path.is_file():
            raise SynthkdError(f"{self.path}: not there; write it with `synthkd index {folder}`")
        with self.errors():
            self.file = self.pa.parquet.ParquetFile(self.path, page_checksum_verification=True)
            self.schema, meta = self.file.schema_arrow, self.file.metadata
            note = json.loads((self.schema.metadata or {}).get(_NOTE, b"null"))
        self.rows: int = meta.num_rows
        self.groups: int = meta.num_row_groups
        self.note: dict[str, Any] = note if isinstance(note, dict) else {}
        sizes = [meta.row_group(i) for i in range(self.groups)]
        if not self.note or any(g.num_rows > GROUP_ROWS or g.total_byte_size > _LARGEST_GROUP for g in sizes):
            again = f"write it again with `synthkd index {folder}`"
            raise SynthkdError(f"{self.path}: not a table of a synthkd set; {again}")

    def errors(self) -> "_Errors":
        """What pyarrow says of a damaged file, as one line."""
        return _Errors(self)

    def id_range(self, number: int) -> tuple[int, int] | None:
        """Lowest and highest id of a row group as its footer states them, by which readers pass over groups."""
        found = self.file.metadata.row_group(number).column(self.schema.names.index("id")).statistics
        return (found.min, found.max) if found is not None and found.has_min_max else None

    def group(self, number: int, columns: Sequence[str] | None = None) -> Any:
        """One row group as an Arrow table."""
        with self.errors():
            return self.file.read_row_group(number, columns=columns, use_threads=False).combine_chunks()


class _Errors:
    def __init__(self, file: _File) -> None:
        self.file = file

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        """Turn what pyarrow raises into a SynthkdError."""
        if isinstance(value, (self.file.pa.ArrowException, OSError, ValueError, KeyError, RecursionError)):
            path = self.file.path
            raise SynthkdError(
                f"{path}: not readable ({value!s:.120}); write it again with `synthkd index {path.parent}`"
            ) from value


def is_fresh(folder: Path, index: Mapping[int, ShardRow] | None = None) -> bool:
    """Whether the table is there and was made from this index; values are not compared."""
    if not (folder / TABLE).is_file():
        return False
    try:
        return bool(_File(folder).note.get("digest") == index_digest(read_index(folder) if index is None else index))
    except SynthkdError:
        return False


def check_table(folder: Path) -> list[str]:
    """Problems of a set's table, each one line: stale, missing or doubled rows, wrong values; [] where there is none.

    The table is compared with `rows/` row group by row group. A table is optional: without the file, or without
    pyarrow (which is logged), there is nothing to say. Raises SynthkdError where `rows/` cannot be read.
    """
    if not (folder / TABLE).is_file():
        return []
    if not has_parquet():
        _log.warning("%s is not checked: %s", TABLE, MISSING)
        return []
    try:
        file = _File(folder)
    except SynthkdError as error:
        return [str(error).partition("; write it again")[0]]
    source = _Source(folder, {n.removeprefix(LOSSES) for n in file.schema.names if n.startswith(LOSSES)})
    for name in ("fingerprint", "format", "samples", "digest"):
        if file.note.get(name) != source.note[name]:
            return [f"{TABLE}: stale, its {name} is not the set's; run `synthkd index {folder}`"]
    try:
        return list(_differences(file, source))
    except _NewLossError as error:
        return [f"{TABLE}: lacks a column of the rows ({', '.join(error.args)}); run `synthkd index {folder}`"]


def _differences(file: _File, source: _Source) -> Iterator[str]:
    if not file.schema.equals(source.schema):
        yield f"{TABLE}: its columns are not those of the set's rows"
        return
    if file.rows != source.note["samples"]:
        yield f"{TABLE}: has {file.rows} rows, the index counts {source.note['samples']} images"
        return
    found = 0
    for number, wanted in enumerate(source.tables()):
        try:
            have = file.group(number) if number < file.groups else None
        except SynthkdError as error:
            yield str(error).partition("; write it again")[0]
            return
        if have is None or len(have) != len(wanted):
            yield f"{TABLE}: row group {number} has not the {len(wanted)} rows expected there"
            return
        if file.id_range(number) != (wanted["id"][0].as_py(), wanted["id"][-1].as_py()):
            yield f"{TABLE}: the range of ids of row group {number} is not that of its rows"
        for line in _wrong_rows(have, wanted):
            found += 1
            if found <= _SHOWN:
                yield line
    if found > _SHOWN:
        yield f"{TABLE}: {found - _SHOWN} more values differ"
    for name in sorted(set(source.losses) - source.seen):
        yield f"{TABLE}: no row has its column {LOSSES}{name}"


def _wrong_rows(have: Any, wanted: Any) -> Iterator[str]:
    for name in wanted.column_names:
        ours, theirs = wanted[name], have[name]
        if ours.equals(theirs):
            continue
        keys = wanted["key"].to_pylist()
        for key, a, b in zip(keys, ours.to_pylist(), theirs.to_pylist(), strict=True):
            same_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
            if a != b and not same_nan:
                yield f"{TABLE}: {name} of {key} is {b!r:.60}, the rows say {a!r:.60}"


def table_columns(folder: Path) -> dict[str, str]:
    """Names and types of a table's columns; raises SynthkdError where there is no readable table."""
    return {field.name: str(field.type) for field in _File(folder).schema}


def select(
    folder: Path,
    where: Sequence[Condition] = (),
    columns: Sequence[str] = ("key", "shard", "offset", "size"),
) -> Iterator[dict[str, Any]]:
    """Rows of a table that meet all conditions, in id order; a row group is held at a time.

    By default where each image lies: `size` bytes from `offset` in the file `shard`. A null meets no condition; the log
    says so where the table is not of the set's index.
    Raises SynthkdError for an unknown column, or a value of another type than its column's.
    """
    file = _File(folder)
    if not is_fresh(folder):
        _log.warning("%s: stale, it tells of another state of the set; run `synthkd index %s`", file.path, folder)
    for name in (*columns, *(c.column for c in where)):
        _known(file, name)
    needed = list(dict.fromkeys((*columns, *(c.column for c in where))))
    for number in range(file.groups):
        table = file.group(number, needed)
        for condition in where:
            table = table.filter(_mask(file, table, condition))
        yield from table.select(list(columns)).to_pylist()


def _known(file: _File, name: str) -> None:
    if name not in file.schema.names:
        raise SynthkdError(f"{file.path}: no column {name!r}; {suggest(name, file.schema.names)}")


def _mask(file: _File, table: Any, condition: Condition) -> Any:
    compare = {"==": "equal", "!=": "not_equal", ">": "greater", ">=": "greater_equal", "<": "less", "<=": "less_equal"}
    kind = file.schema.field(condition.column).type
    try:
        value = file.pa.scalar(condition.value, kind)
        return file.pa.compute.call_function(compare[condition.operator], [table[condition.column], value])
    except (file.pa.ArrowException, TypeError, ValueError) as error:
        raise SynthkdError(
            f"where: {condition.column} {condition.operator} {condition.value!r:.40}: expected a value of type {kind}"
        ) from error


def parse_condition(text: str, kinds: Mapping[str, str]) -> Condition:
    """`COLUMN OP VALUE` as a condition on a table of these column types; raises SynthkdError for anything else."""
    found = _OPERATOR.search(text)
    if found is None:
        raise SynthkdError(f"--where {text!r}: expected COLUMN OP VALUE, OP one of {', '.join(OPERATORS)}")
    column, value = text[: found.start()].strip(), text[found.end() :].strip()
    if column not in kinds:
        raise SynthkdError(f"--where {text!r}: no column {column!r}; {suggest(column, kinds)}")
    try:
        return Condition(column, found[0], _value(value, kinds[column]))
    except (ValueError, KeyError) as error:
        raise SynthkdError(f"--where {text!r}: expected a value of type {kinds[column]}") from error


def _value(text: str, kind: str) -> str | int | float | bool:
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    return text if kind == "string" else float(text) if kind == "double" else int(text)
