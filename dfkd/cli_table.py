"""`synthkd index`, `stats`, `export-folder`: what a finished set is looked at and handed on with."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from synthkd.dfkd.cli_progress import Bars, StopFlag, StoppableBars
from synthkd.engine.errors import SynthkdError

out = Console()
SetDir = Annotated[Path, typer.Argument(help="Folder of a synthetic set.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def index(
    set_dir: SetDir,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only list rows that fit, such as 'class == cat' or 'confidence > 0.9'; may be repeated."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the table index.parquet and the card README.md of a set, or with --where list images of its table."""
    from synthkd.engine.card import write_card
    from synthkd.engine.index import read_manifest
    from synthkd.engine.table import parse_condition, select, table_columns, write_table

    if not where:
        with StopFlag() as stop, StoppableBars(Console(stderr=True), stop) as bars:
            for stage in ("table", "card"):
                bars.begin(stage, int(read_manifest(set_dir)["num_samples"]), "images")
            table = write_table(set_dir, lambda n: bars.advance("table", n))
            card = write_card(set_dir, lambda n: bars.advance("card", n))
        told = {"table": str(table), "card": str(card) if card else None}
        text = f"{table}{f', {card.name}' if card else '; README.md is your own and stays as it is'}"
        out.print(json.dumps(told) if json_output else text, soft_wrap=True, highlight=False, markup=False)
        return
    kinds = table_columns(set_dir)
    for row in select(set_dir, [parse_condition(text, kinds) for text in where]):
        print(json.dumps(row) if json_output else f"{row['key']} {row['shard']} {row['offset']} {row['size']}")


def stats(
    set_dir: SetDir,
    target: Annotated[Path | None, typer.Option("--out", help="The page (default: stats.html in the set).")] = None,
    sample: Annotated[int, typer.Option(help="Images whose pixels are looked at, chosen by seed.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of that choice.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON; no page.")] = False,
) -> None:
    """Figures of a set as one self-contained page: balance, confidence, losses, pixels, times, near-copies."""
    from synthkd.dfkd.report_stats import write_stats
    from synthkd.dfkd.stats import measure_set, sample_size

    count = sample_size(sample)
    with StopFlag() as stop, StoppableBars(Console(stderr=True), stop) as bars:
        found = measure_set(set_dir, count, seed, bars)
    if json_output:
        print(json.dumps(found.figures(), sort_keys=True))
    if target is not None or not json_output:
        path = write_stats(found, target or set_dir / "stats.html")
        if not json_output:
            out.print(str(path), soft_wrap=True, highlight=False, markup=False)


def export_folder(
    set_dir: SetDir,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write to; one of an earlier export goes on.")],
    split: Annotated[str, typer.Option(help="Shares by name, such as train=0.9,val=0.1.")] = "train=1",
    previews: Annotated[bool, typer.Option("--previews", help="With the previews of the images.")] = False,
) -> None:
    """Copy a set into folders by class (train/CLASS/KEY.png) with labels.csv and classes.json."""
    from synthkd.dfkd.export_folder import export_images, parse_split

    shares = parse_split(split)
    with Bars(out) as bars, StopFlag() as stop:
        done = export_images(set_dir, out_dir, shares, previews, bars, stop.is_set)
        if done.stopped:
            raise typer.Exit(stop.exit_code(out, "the same command goes on from here", "image"))
    told: dict[str, Any] = vars(done)
    if done.present == 0:
        raise SynthkdError(f"{set_dir}: holds no finished image; finish the set with the command that began it")
    out.print(f"{out_dir}: {told['present']} images, {told['written']} written now", soft_wrap=True, highlight=False)
