"""The Parquet table and the card of a set: what they say is what the rows say, and nothing in them is code."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthkd.bench.table import synthetic_set
from synthkd.engine import GuidanceSpec, SynthkdError, write_shards
from synthkd.engine import table as tables
from synthkd.engine.card import CARD, MARK, UNKNOWN, card_problems, describe_set, prior_licence, write_card
from synthkd.engine.rows import rows_path
from synthkd.engine.shards import short_digest
from synthkd.engine.table import TABLE, Condition, check_table, is_fresh, parse_condition, select, write_table

pq = pytest.importorskip("pyarrow.parquet", reason="part of the dev extra")


@pytest.fixture
def rows_only(tmp_path: Path) -> Path:
    """Two shards of eighty samples: rows without images."""
    synthetic_set(tmp_path / "set", 160, classes=5, shard_samples=80)
    return tmp_path / "set"


def amend(folder: Path, shard: int, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the groups of a shard, with an index that vouches for them."""
    path, index = rows_path(folder, shard), folder / "index.jsonl"
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    change(groups)
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[shard]["rows"] = hashlib.sha256(path.read_bytes()).hexdigest()
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_rows(folder: Path) -> list[dict[str, Any]]:
    """The whole table, row by row."""
    return list(select(folder, [], list(tables.table_columns(folder))))


def test_a_row_is_the_image_it_places(canned: Callable[..., Any], tmp_path: Path) -> None:
    """Every image once, by id; offset and size find bytes of the stated digest, whose json says the same."""
    stream = canned(20, guidance=GuidanceSpec(scale=0.2))
    write_shards(stream, tmp_path)
    write_table(tmp_path)
    rows = all_rows(tmp_path)
    assert [row["id"] for row in rows] == list(range(20))
    for row in rows:
        data = (tmp_path / row["shard"]).read_bytes()
        assert short_digest(data[row["offset"] : row["offset"] + row["size"]]) == row["digest"]
        start = row["offset"] + -(-row["size"] // 512) * 512 + 512
        meta, _ = json.JSONDecoder().raw_decode(data[start : start + 4096].decode("latin-1"))
        for name in ("key", "label", "class", "seed", "group", "attempt"):
            assert meta[name] == row[name]
        assert {n: row[f"losses.{n}"] for n in meta["losses"]} == pytest.approx(meta["losses"], abs=1e-6)
        assert 0 < row["confidence"] < 1
        assert (row["round"], row["repaired"]) == (0, False)
        assert (tmp_path / "environments" / f"{row['environment']}.json").is_file()


def test_equal_content_has_equal_bytes(canned: Callable[..., Any], tmp_path: Path) -> None:
    """The order in which shards were written, and how often, leaves no trace in table and card."""
    for name, order in (("a", [0, 1]), ("b", [1, 0])):
        if name == "b":
            write_shards(canned(20), tmp_path / name, shards=[1], should_stop=lambda: True)
        write_shards(canned(20), tmp_path / name, shards=order)
        assert describe_set(tmp_path / name) == [tmp_path / name / TABLE, tmp_path / name / CARD]
        assert describe_set(tmp_path / name) == []
    for file in (TABLE, CARD):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_written_only_when_complete_and_anew_when_grown(canned: Callable[..., Any], tmp_path: Path) -> None:
    """A missing shard: nothing is written; a grown set: the old table is stale until it is written again."""
    write_shards(canned(30), tmp_path, shards=[0])
    assert describe_set(tmp_path) == []
    write_shards(canned(30), tmp_path)
    describe_set(tmp_path)
    assert check_table(tmp_path) == []
    write_shards(canned(32), tmp_path)
    assert not is_fresh(tmp_path)
    assert any("stale" in line for line in check_table(tmp_path))
    assert len(describe_set(tmp_path)) == 2
    assert check_table(tmp_path) == []
    assert "32 synthetic images" in (tmp_path / CARD).read_text()


def test_row_groups_do_not_show(rows_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into groups of 7 across shards the rows are the same, checked and found."""
    write_table(rows_only)
    whole = all_rows(rows_only)
    monkeypatch.setattr(tables, "GROUP_ROWS", 7)
    write_table(rows_only)
    assert pq.ParquetFile(rows_only / TABLE).num_row_groups == 23
    assert all_rows(rows_only) == whole
    assert check_table(rows_only) == []
    where = [Condition("class", "==", "class 3"), Condition("confidence", ">", 0.5)]
    wanted = [row["key"] for row in whole if row["label"] == 3 and row["confidence"] > 0.5]
    assert [row["key"] for row in select(rows_only, where)] == wanted
    assert wanted


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_that_only_some_groups_have_is_null_elsewhere(rows_only: Path, late: bool) -> None:
    """A term of one shard, or of the last group of a shard alone, is a column of the whole table."""

    def add(groups: list[dict[str, Any]]) -> None:
        for group in groups[1:] if late else groups:
            group["table"]["losses.adv"] = [0.5] * group["kept"]

    amend(rows_only, 1, add)
    write_table(rows_only)
    values = [row["losses.adv"] for row in all_rows(rows_only)]
    edge = 120 if late else 80
    assert values == [None] * edge + [0.5] * (160 - edge)
    assert check_table(rows_only) == []


def _other_value(table: Any) -> Any:
    import pyarrow as pa

    values = table["confidence"].to_pylist()
    values[3] = 0.123
    return table.set_column(
        table.schema.get_field_index("confidence"), table.schema.field("confidence"), pa.array(values)
    )


def _nulls(table: Any) -> Any:
    import pyarrow as pa

    return pa.nulls(len(table), pa.float64())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_value, "confidence of 000000003 is 0.123"),
        (lambda table: table.slice(1), "159 rows, the index counts 160"),
        (lambda table: table.drop_columns(["label"]), "columns are not those"),
        (lambda table: table.drop_columns(["losses.ce"]), "lacks a column of the rows"),
        (lambda table: table.add_column(9, "losses.adv", _nulls(table)), "no row has its column losses.adv"),
        (lambda table: table.replace_schema_metadata({}), "not a table of a synthkd set"),
    ],
)
def test_check_names_what_is_wrong(rows_only: Path, change: Callable[[Any], Any], words: str) -> None:
    """A planted error in the table is found and named, in one line."""
    write_table(rows_only)
    assert check_table(rows_only) == []
    pq.write_table(change(pq.read_table(rows_only / TABLE)), rows_only / TABLE)
    problems = check_table(rows_only)
    assert len(problems) == 1
    assert words in problems[0]


def test_check_finds_damage_and_what_changed_since(rows_only: Path) -> None:
    """Turned bytes and cut files are problems, never a traceback; so are rows that changed after the table."""
    path = write_table(rows_only)
    good = path.read_bytes()
    for at in (pq.ParquetFile(path).metadata.row_group(0).column(i).data_page_offset + 120 for i in (0, 1, 8)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
        assert len(check_table(rows_only)) >= 1, at
    for bad in (b"", b"PAR1", good[:-9], b"x" * 4096):
        path.write_bytes(bad)
        assert "not readable" in check_table(rows_only)[0]
    path.write_bytes(good)
    amend(rows_only, 0, lambda groups: groups[0].update(repaired=True))
    problems = check_table(rows_only)
    assert len(problems) == 11
    assert "repaired of 000000000 is False, the rows say True" in problems[0]
    assert "30 more" in problems[-1]
    path.unlink()
    assert check_table(rows_only) == []


def _set(name: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(groups: list[dict[str, Any]]) -> None:
        groups[1]["table"][name][0] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups[0]["table"]["size"].pop(),
        lambda groups: groups[0].update(table={}),
        lambda groups: groups[0]["members"].popitem() and groups[0].update(members={}),
        _set("key", "../../etc/passwd"),
        _set("key", "000000001"),
        _set("label", 5),
        _set("label", True),
        _set("offset", -1),
        _set("size", 2**40),
        _set("confidence", "high"),
        _set("losses.ce", [1]),
    ],
)
def test_contradicting_rows_are_one_line(rows_only: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rows that no set has are refused by file, and no table is left behind."""
    amend(rows_only, 1, change)
    with pytest.raises(SynthkdError, match=r"shard-000001\.jsonl: "):
        write_table(rows_only)
    assert not list(rows_only.glob("index.parquet*"))


def test_a_condition_ends_at_its_first_operator() -> None:
    assert parse_condition("class == a>=b", {"class": "string"}) == Condition("class", "==", "a>=b")
    assert parse_condition("id>=7", {"id": "int64"}) == Condition("id", ">=", 7)


def test_a_stale_table_says_so(rows_only: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(rows_only)
    list(select(rows_only))
    assert not caplog.text
    index = rows_only / "index.jsonl"
    index.write_text(index.read_text().splitlines()[0] + "\n")
    list(select(rows_only))
    assert "stale" in caplog.text
    assert "synthkd index" in caplog.text


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (Condition("clas", "==", "a"), "did you mean 'class'"),
        (Condition("label", ">", "much"), "expected a value of type int32"),
    ],
)
def test_a_wrong_condition_is_one_line(rows_only: Path, where: Condition, words: str) -> None:
    """Unknown columns and values of another type are named."""
    write_table(rows_only)
    with pytest.raises(SynthkdError, match=words):
        list(select(rows_only, [where]))


def test_without_pyarrow(rows_only: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The card is written and the log names the extra; asking for the table is one line."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with caplog.at_level("INFO", "synthkd"):
        assert describe_set(rows_only) == [rows_only / CARD]
    assert "synthkd[parquet]" in caplog.text
    with pytest.raises(SynthkdError, match=r"pip install 'synthkd\[parquet\]'"):
        write_table(rows_only)


HOSTILE = [
    "<script>alert(1)</script>",
    "`code` | cell\n# title\n---\nlicense: mit",
    "```\nout",
    "\u202egnp.exe\x00",
    "é🙂",
]


def test_card_holds_hostile_names_as_text(rows_only: Path) -> None:
    """The front matter is the YAML meant; names and prompts stay within code, and the recipe reads back as it was."""
    yaml = pytest.importorskip("yaml")
    path = rows_only / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"] |= {"classes": HOSTILE, "prompts": [f"{name} {{class}}" for name in HOSTILE]}
    path.write_text(json.dumps(manifest))
    card = write_card(rows_only)
    assert card is not None
    text = card.read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["size_categories"] == ["n<1K"]
    assert [c["config_name"] for c in front["configs"]] == ["default"]
    assert "\u202e" not in text
    assert "\x00" not in text
    told = text.split("## Recipe\n\n````json\n")[1].split("\n````\n")[0]
    assert json.loads(told) == manifest["recipe"]
    table = text.split("## Images per class\n\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(HOSTILE)
    assert table[2].startswith("| 0 | `<script>alert(1)</script>` |")
    assert table[3].startswith("| 1 | `` `code` \\| cell # title --- license: mit `` |")


def test_names_of_the_manifest_stay_within_code(rows_only: Path) -> None:
    path = rows_only / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["guidance"] |= {"a | b <img src=x onerror=alert(1)> [c](http://x)\n# d": 1}
    path.write_text(json.dumps(manifest))
    assert write_card(rows_only) == rows_only / CARD
    (line,) = (line for line in (rows_only / CARD).read_text().splitlines() if "onerror" in line)
    assert line == "| guidance `a \\| b <img src=x onerror=alert(1)> [c](http://x) # d` | `1` |"


def test_a_card_of_another_state_is_stale(rows_only: Path) -> None:
    """By its shards, or by its counts alone; a table that is fresh does not vouch for it."""
    describe_set(rows_only)
    assert card_problems(rows_only) == []
    clean = (rows_only / CARD).read_text()
    amend(rows_only, 0, lambda groups: groups[0].update(repaired=True))
    write_table(rows_only)
    assert "README.md: stale" in card_problems(rows_only)[0]
    write_card(rows_only)
    assert card_problems(rows_only) == []
    index = rows_only / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps({**row, "bytes": 1}) + "\n" for row in rows))
    write_table(rows_only)  # a kill between table and card
    assert describe_set(rows_only) == [rows_only / CARD]
    assert card_problems(rows_only) == []
    assert (rows_only / CARD).read_text() != clean


def test_own_readme_is_left_alone(rows_only: Path) -> None:
    """A README.md without the mark stays; ours is written anew."""
    (rows_only / CARD).write_text("mine")
    describe_set(rows_only)
    assert (rows_only / CARD).read_text() == "mine"
    (rows_only / CARD).write_text(f"old\n{MARK}\n")
    assert write_card(rows_only) == rows_only / CARD
    assert "160 synthetic images" in (rows_only / CARD).read_text()


def test_prior_licence_is_what_its_folder_states(tmp_path: Path) -> None:
    """Front matter first, then a LICENSE file's first line, else unknown; never more than one short line."""
    assert prior_licence("embedded:digits") == "apache-2.0"
    assert prior_licence(str(tmp_path)) == prior_licence("some/hub-id") == prior_licence("") == UNKNOWN
    (tmp_path / "LICENSE").write_text("\n\n  Open RAIL-M\x1b[31m licence\nmore")
    assert prior_licence(str(tmp_path)) == "Open RAIL-M [31m licence"
    readme = tmp_path / "README.md"
    readme.write_text("---\ntags: [a]\nlicense: 'MIT'\n---\n")
    assert prior_licence(str(tmp_path)) == "mit"
    readme.write_text("---\ntags: [a]\n---\nlicense: mit\n")
    assert prior_licence(str(tmp_path)).startswith("Open RAIL-M")
    readme.write_text("---\nlicense: a\x00b `x` {evil}\n---\n")
    assert prior_licence(str(tmp_path)).startswith("Open RAIL-M")
