"""Tools that look at a set that a stranger made: pipes and links in it are refused or passed over, never waited for."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd.export_folder import export_images
from synthkd.dfkd.report_stats import write_stats
from synthkd.dfkd.stats import measure_set
from synthkd.engine import SynthkdError, write_shards
from synthkd.engine.card import CARD, prior_licence, write_card
from synthkd.engine.columns import first_losses
from synthkd.engine.rows import read_index
from synthkd.engine.verify import NOTES, verify_set


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A test that waits for a pipe fails."""

    def ring(*_: object) -> None:
        raise AssertionError("not done in time")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(canned: Callable[..., Any], tmp_path: Path) -> Path:
    """A finished set of 20 images in two shards."""
    write_shards(canned(20), tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_notes_of_a_check_that_are_no_file(folder: Path, tmp_path: Path, kind: str) -> None:
    """Nothing is written through a link, nothing waits; the check says what it would say without them."""
    notes, foreign = folder / NOTES, tmp_path / "foreign"
    foreign.write_text("mine")
    {"link": lambda: notes.symlink_to(foreign), "pipe": lambda: os.mkfifo(notes), "folder": notes.mkdir}[kind]()
    assert verify_set(folder, resume=True, should_stop=lambda: True).stopped
    assert verify_set(folder, resume=True).problems == ()
    assert foreign.read_text() == "mine"
    assert notes.is_dir() == (kind == "folder")
    assert kind == "folder" or not os.path.lexists(notes)


def _replaced(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_pipes_in_place_of_files(folder: Path, tmp_path: Path) -> None:
    _replaced(folder / "shard-000000.tar")
    with pytest.raises(SynthkdError, match=r"shard-000000\.tar: is a pipe"):
        measure_set(folder, sample=20)
    with pytest.raises(SynthkdError, match=r"shard-000000\.tar: is a pipe"):
        export_images(folder, tmp_path / "out", {"train": 1.0})
    _replaced(folder / CARD)
    assert write_card(folder) is None
    _replaced(folder / "rows/shard-000001.jsonl")
    with pytest.raises(SynthkdError, match="is a pipe"):
        first_losses(folder, read_index(folder))
    os.mkfifo(tmp_path / "LICENSE")
    assert prior_licence(str(tmp_path)).startswith("unknown")


def test_rows_of_one_endless_line_and_links(folder: Path, tmp_path: Path) -> None:
    listed = folder / "rows/shard-000001.jsonl"
    with listed.open("wb") as f:
        f.truncate(2 * 10**11)  # sparse
    with pytest.raises(SynthkdError, match="a line is above"):
        first_losses(folder, read_index(folder))
    listed.rename(tmp_path / "rows")
    listed.symlink_to(tmp_path / "rows")
    with pytest.raises(SynthkdError, match="leaves the set's folder"):
        first_losses(folder, read_index(folder))


def test_the_page_follows_no_link(folder: Path, tmp_path: Path) -> None:
    foreign, page = tmp_path / "foreign", folder / "stats.html"
    foreign.write_text("mine")
    (folder / "stats.html.tmp").symlink_to(foreign)
    page.symlink_to(foreign)
    assert write_stats(measure_set(folder, sample=1), page) == page
    assert foreign.read_text() == "mine"
    assert "<html" in page.read_text()
