"""`synthkd bench`: the benchmark suites."""

import typer

app = typer.Typer(help="Benchmark suites; each prints its rows and can append them to a file.", no_args_is_help=True)
