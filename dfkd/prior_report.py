"""One page about the training of a prior: what it draws, how both stages went, and what it was made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkd.dfkd import report_html as h
from synthkd.dfkd.prior_loop import read_log
from synthkd.dfkd.report_charts import Axis, Curve, line_chart
from synthkd.engine.rows import write_atomically

REPORT = "training.html"
_POINTS = 400  # of a curve, at most
_FACTS = ("device", "trained_on", "images", "captions", "size", "parameters", "versions", "sha256")
_Row = Mapping[str, Any]


def write_report(folder: Path, told: Mapping[str, Any], rows: Sequence[str], sheet: bytes) -> None:
    """training.html, from the log and what prior.json says; rows: captions of the rows of the PNG `sheet`."""
    log = read_log(folder)
    sections = [_samples(rows, sheet), _denoiser(told, log), _autoencoder(told, log), _facts(told)]
    names = ", ".join(told["trained_on"])
    weights = sum(told["parameters"].values()) / 1e6
    lead = f"A text-conditional latent diffusion model of {weights:.1f} million weights, trained on {names}."
    write_atomically(folder / REPORT, h.page("A prior of one's own", lead, h.join([]), sections))


def _samples(rows: Sequence[str], sheet: bytes) -> h.Section:
    count = len(rows)
    image = h.sheet(rows, sheet, f"Samples, one row for each of {count} captions.", "guided", 8, True, "samples")
    text = "Drawn by diffusers' own loop: 25 steps, guidance scale 2, nothing picked by hand."
    return h.Section("samples", "Samples", f"What it draws for {count} of its captions.", [image, h.note(text)])


def _denoiser(told: _Row, log: Sequence[_Row]) -> h.Section:
    losses = _chart("Denoiser", "loss", log, "unet", {"loss": "unguided", "held_out_loss": "guided"})
    charts = [losses, _speed(log, "unet")]
    found = told["unet"]["held_out_loss"]
    text = "Weighted squared error of the velocity. What is held out is told by the averaged weights, which are kept."
    body = [_grid(charts), h.note(text)]
    return h.Section("denoiser", "Denoiser", f"On images it never saw its loss is {h.number(found)}.", body)


def _autoencoder(told: _Row, log: Sequence[_Row]) -> h.Section:
    charts = [_chart("Autoencoder", "loss", log, "vae", {"loss": "unguided"}),
              _chart("Reconstruction", "dB", log, "vae", {"psnr_held_out": "guided"}), _speed(log, "vae")]  # fmt: skip
    found = told["vae"]["psnr_held_out"]
    return h.Section(
        "autoencoder", "Autoencoder", f"Images it never saw come back with {found:.1f} dB.", [_grid(charts)]
    )


def _facts(told: _Row) -> h.Section:
    rows = [(name.replace("_", " "), _words(told[name])) for name in _FACTS if name in told]
    rows += [(name.replace("_", " "), _words(value)) for name, value in told["identity"].items()]
    seconds = sum(told[stage].get("seconds", 0.0) for stage in ("vae", "unet"))
    table = h.table("What it was made of", ["field", "value"], rows, "facts")
    return h.Section("facts", "Facts", f"Both stages took {h.duration(seconds)} of training.", [table])


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {one}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _grid(charts: Sequence[h.Html | None]) -> h.Html:
    return h.grid([chart for chart in charts if chart is not None])


def _speed(log: Sequence[_Row], stage: str) -> h.Html | None:
    return _chart("Speed", "images/s", log, stage, {"images_per_second": "rest"}, log_scale=False)


def _chart(
    title: str, unit: str, log: Sequence[_Row], stage: str, columns: Mapping[str, str], log_scale: bool = True
) -> h.Html | None:
    """Columns of a stage's rows over steps, by name and tone; None where the log has none of them."""
    curves = []
    for column, tone in columns.items():
        points = _thinned([(row["step"], row[column]) for row in log if row["stage"] == stage and column in row])
        if points:
            xs, ys = zip(*points, strict=True)
            curves.append(Curve(_LABELS[column], tone, xs, ys))
    if not curves:
        return None
    x = Axis.over("step", [0.0, *(v for c in curves for v in c.xs)])
    y = Axis.over(unit, (v for c in curves for v in c.ys), log=log_scale and unit != "dB")
    return line_chart(title, unit, curves, x, y, f"{title}, {unit}, over training steps.")


_LABELS = {"loss": "trained", "held_out_loss": "held out", "psnr_held_out": "held out", "images_per_second": "rate"}


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, the last one among them."""
    step = -(-len(points) // _POINTS) or 1
    return [*points[len(points) - 1 :: -step]][::-1]
