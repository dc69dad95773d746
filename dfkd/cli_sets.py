"""`synthkd verify`, `repair` and `merge`: sets that are checked, mended and put together."""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.cli_progress import Bars, StopFlag, StoppableBars
from synthkd.engine import SynthkdError
from synthkd.engine.verify import VerifyReport

out = Console()
SetDir = Annotated[Path, typer.Argument(help="Folder of a synthetic set.")]
SetOrUrl = Annotated[str, typer.Argument(help="Folder or URL of a synthetic set.")]


def verify(
    place: SetOrUrl,
    workers: Annotated[int | None, typer.Option(help="Processes that check (default: one; on large sets all).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what a check that was ended had found.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check a set against its manifest and index; every damaged or missing member is named.

    Ended, the same command goes on with the shards that it has not seen.
    """
    from synthkd.engine.index import read_manifest
    from synthkd.engine.stores import is_url
    from synthkd.engine.verify import drop_notes, verify_set

    options.check_workers(workers)
    if is_url(place):
        _verify_url(place, as_json)
        return
    set_dir = Path(place)
    total = int(read_manifest(set_dir)["num_samples"])
    if fresh:
        drop_notes(set_dir)
    with Bars(Console(stderr=as_json)) as bars, StopFlag() as stop:
        bars.begin("verify", total, "images")
        report = verify_set(
            set_dir,
            lambda n: bars.advance("verify", n),
            workers=workers,
            resume=True,
            should_stop=stop.is_set,
        )
    if as_json:
        print(json.dumps({"set": str(set_dir), **asdict(report)}, indent=2))
    if report.stopped:
        hint = "the same command goes on from here"
        raise typer.Exit(stop.exit_code(Console(stderr=as_json), hint, "shard"))
    _refuse(set_dir, report)
    if not as_json:
        again = f" ({report.resumed} of them seen before)" if report.resumed else ""
        text = f"{set_dir}: {report.samples} images in {report.shards} shards, all as written{again}"
        out.print(text, soft_wrap=True, highlight=False)


def _verify_url(url: str, as_json: bool) -> None:
    """Shard by shard, each fetched into a temporary folder; what repair cannot reach is drawn by the run's command."""
    from synthkd.engine.remote_read import verify_url

    with tempfile.TemporaryDirectory(prefix="synthkd-") as name, Bars(Console(stderr=as_json)) as bars:
        bars.begin("verify", None, "images")
        report = verify_url(url, Path(name), lambda n: bars.advance("verify", n))
    if as_json:
        print(json.dumps({"set": url, **asdict(report)}, indent=2))
    _refuse(url, report)
    if not as_json:
        _say(f"{url}: {report.samples} images in {report.shards} shards, all as written")


def _refuse(set_dir: Path | str, report: VerifyReport) -> None:
    """Problems on standard error, and how to mend them."""
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if report.found > len(report.problems):
        print(f"... and {report.found - len(report.problems)} more", file=sys.stderr)
    if report.found:
        mend = f"run `synthkd repair {set_dir}`"
        if isinstance(set_dir, str):
            mend = "remove index/shard-NNNNNN.json of the shards named above and run the command that drew it again"
        raise SynthkdError(f"{set_dir}: {report.found} problems in {report.shards} shards; {mend}")


def repair(
    set_dir: SetDir,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    workers: options.Workers = None,
    model: Annotated[str | None, typer.Option(help="Where the model lies now, if it moved.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Where the teacher card lies now, if it moved.")] = None,
    allow_code: options.AllowCode = False,
    fuse: Annotated[str | None, typer.Option(help="Fused modules (default: as the images were drawn).")] = None,
    artifacts: options.Artifacts = None,
    device: options.Device = None,
) -> None:
    """Draw again what is missing or damaged, from the manifest alone, and touch nothing else.

    On other hardware the new images differ, and their rows say where they were drawn.
    """
    from synthkd.dfkd.repairing import repair_set
    from synthkd.dfkd.replay import Again
    from synthkd.engine.index import read_manifest
    from synthkd.engine.workers import default_workers

    options.check_workers(workers)
    where = options.pick_device(device)
    total = int(read_manifest(set_dir)["num_samples"])
    moved = {"model": model, "teacher": teacher}
    again = Again(set_dir, where, allow_code, fuse, artifacts, workers or default_workers(where), moved=moved)

    def begin(groups: int) -> None:
        bars.begin("draw", groups, "groups")
        bars.begin("check", None, "images")

    with Bars(out) as bars, StopFlag() as stop:
        bars.begin("verify", total, "images")
        done = repair_set(
            again, dry_run=dry_run, checkers=workers, tell=_say,
            on_shard=lambda n: bars.advance("verify", n), on_needs=begin,
            on_group=lambda: bars.advance("draw", 1), should_stop=stop.is_set,
            on_mended=lambda n: bars.advance("check", n) if n else None,
        )  # fmt: skip
    if done.stopped:
        raise typer.Exit(stop.exit_code(out, "the same command goes on from here"))
    for problem in done.left:
        print(problem, file=sys.stderr)
    if done.left:
        raise SynthkdError(f"{set_dir}: {len(done.left)} problems that repair cannot mend; each line above says why")
    words = "would be mended" if dry_run else "mended"
    _say(f"{set_dir}: {done.mended} shards {words}" if done.mended else f"{set_dir}: nothing to mend")


def _say(line: str) -> None:
    out.print(line, soft_wrap=True, highlight=False, markup=False)


def merge(
    places: Annotated[
        list[str], typer.Argument(help="Folders or URLs of one set, or one folder that several runs have shared.")
    ],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder of the whole set; it may hold a part.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard links in place of copies (one file system).")] = False,
) -> None:
    """Put folders that hold shards of one set together; a lone set without --out gathers the index of its parts."""
    from synthkd.engine.index import read_manifest
    from synthkd.engine.merge import gather_parts, merge_sets
    from synthkd.engine.stores import is_url
    from synthkd.engine.verify import open_state

    if any(map(is_url, places)):
        _fetch(places, out_dir)
        return
    sets = [Path(place) for place in places]
    if out_dir is None:
        if len(sets) > 1 or link:
            raise SynthkdError("merge of several sets, or with --link, needs --out, the folder of the whole set")
        with StopFlag() as stop, StoppableBars(out, stop) as stoppable:
            stoppable.begin("table", int(read_manifest(sets[0])["num_samples"]), "images")
            done, where = gather_parts(sets[0], lambda n: stoppable.advance("table", n)), sets[0]
    else:
        samples = {row.shard: row.samples for folder in sets for row in open_state(folder).index.values()}
        total, where = sum(samples.values()), out_dir
        with Bars(out) as bars, StopFlag() as stop:
            bars.begin("merge", total, "images")
            done = merge_sets(
                sets, out_dir, link=link, on_shard=lambda n: bars.advance("merge", n), should_stop=stop.is_set
            )
        if done.stopped:
            raise typer.Exit(stop.exit_code(out, "the same command goes on from here", "shard"))
    _say(f"{where}: {done.samples} images in {done.shards} shards, {done.new} of them new; {_missing(done.missing)}")


def _fetch(places: list[str], out_dir: Path | None) -> None:
    """A set at a URL into a folder."""
    from synthkd.engine.card import describe_set
    from synthkd.engine.remote_read import fetched
    from synthkd.engine.verify import open_state

    if len(places) > 1 or out_dir is None:
        raise SynthkdError("merge of a URL takes that URL alone, and --out, a folder; merge the folders after that")
    with Bars(out) as bars:
        fetched(places[0], out_dir, lambda n: bars.begin("fetch", n, "images"), lambda n: bars.advance("fetch", n))
    state = open_state(out_dir)
    lost = tuple(shard for shard in range(state.plan.num_shards) if shard not in state.index)
    samples = sum(row.samples for row in state.index.values())
    if not lost:
        describe_set(out_dir)
    _say(f"{out_dir}: {samples} images in {len(state.index)} shards, as at {places[0]}; {_missing(lost)}")


def _missing(shards: tuple[int, ...]) -> str:
    """Which shards a set lacks, in words; runs of numbers in short."""
    if not shards:
        return "none is missing"
    runs: list[list[int]] = []
    for shard in shards:
        if runs and shard == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], shard]
        else:
            runs.append([shard])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:10]) + (", ..." if len(runs) > 10 else "")
    return f"{len(shards)} are missing or unfinished: {shown}"
