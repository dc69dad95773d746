"""Rows of results: what was measured, at which commit, on what machine; one JSON line each, appended."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from synthkd.engine.workers import cores

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Short commit of the tree this file is in, `+` behind it where tracked files differ.

    Outside git, as in a copy of a tree, what SYNTHKD_COMMIT says, or `unknown`.
    """
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SYNTHKD_COMMIT", "unknown")


def machine() -> str:
    """The machine in words: no host name."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}"


def stamped(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with date, commit and machine."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {**row, "date": today, "commit": commit(), "machine": machine()}


def with_table(text: str, begin: str, end: str, table: str) -> str:
    """A page whose table, between two marks, is made anew."""
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end, 1)[1]


def append_row(name: str, row: Mapping[str, Any]) -> Path:
    """Append a row to bench/results/NAME.jsonl."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")
    return path
