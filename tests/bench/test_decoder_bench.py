"""`synthkd bench decoder`: rows of a tiny decoder, errors beside times, and no time for a wrong one."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from synthkd.bench import decoder
from synthkd.bench.cli import app
from synthkd.bench.decoder import DecoderSpec, measure_decoder

pytest.importorskip("diffusers", reason="the decoder is diffusers' own")

TINY = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SPEC = DecoderSpec(size=16, batch=2, dtype=torch.float32, device=torch.device("cpu"), repeats=2, config=TINY)


def test_rows_hold_errors_beside_times() -> None:
    rows = list(measure_decoder(SPEC))
    assert [row["direction"] for row in rows] == list(decoder.DIRECTIONS)
    # frozen weights: the gradient of the input costs what the forward pass does
    assert rows[1]["tera_flop"] == pytest.approx(2 * rows[0]["tera_flop"], rel=0.1)
    for row, names in zip(rows, ({"image"}, {"image", "gradient"}), strict=True):
        assert "stock" in row["contenders"]
        for entry in row["contenders"].values():
            assert entry["failed"] is None
            assert entry["error"].keys() == names
            assert all(error < 1e-4 for error in entry["error"].values())
            median = entry["milliseconds"]["median"]
            assert entry["tflop_per_s"] == pytest.approx(row["tera_flop"] / median * 1e3, abs=1e-3)


def test_cudnn_stays_on_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cudnn.flags(allow_tf32=False)` would switch it off."""
    seen: list[tuple[bool, bool]] = []
    cudnn, row = torch.backends.cudnn, decoder._row
    monkeypatch.setattr(decoder, "_row", lambda *a: (seen.append((cudnn.enabled, cudnn.allow_tf32)), row(*a))[1])
    list(measure_decoder(SPEC))
    assert seen == [(True, False)] * 2
    assert cudnn.allow_tf32


def test_fused_modules_are_a_contender() -> None:
    rows = list(measure_decoder(SPEC))
    assert all(row["contenders"].keys() == {"stock", "fused"} for row in rows)
    assert all(row["times_faster_than"].keys() == {"stock", "fused"} for row in rows)


@pytest.mark.parametrize("wrong", [lambda image: image * 1.01, lambda image: image / 0])
def test_a_wrong_decoder_has_no_time(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]) -> None:
    stock = decoder.contenders(SPEC)["stock"]
    found: dict[str, Any] = {"stock": stock, "fused": lambda z: wrong(stock(z))}
    monkeypatch.setattr(decoder, "contenders", lambda spec: found)
    for row in measure_decoder(SPEC):
        entry = row["contenders"]["fused"]
        assert entry["milliseconds"] is None
        assert entry["failed"].startswith("image: error")
        assert row["times_faster_than"] is None
        json.dumps(row, allow_nan=False)


def test_the_default_is_the_decoder_of_stable_diffusion() -> None:
    """2.51 TFLOP for an image of 512 x 512, from shapes alone."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = decoder.random_vae()
        with FlopCounterMode(display=False) as counter:
            vae.decode(torch.empty(1, 4, 64, 64), return_dict=False)
    assert counter.get_total_flops() / 1e12 == pytest.approx(2.51, abs=0.01)


def test_wrong_options_are_one_line() -> None:
    for words, message in (
        (["--size", "100"], "--size is 100; expected a multiple of 8"),
        (["--dtype", "int8"], "--dtype 'int8': known: bfloat16, float16, float32"),
    ):
        error = CliRunner().invoke(app, ["decoder", "--device", "cpu", *words]).exception
        assert error is not None
        assert str(error) == message
        assert error.exit_code == 2  # type: ignore[attr-defined]


def test_command_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthkd.bench.cli.DecoderSpec", lambda **fields: DecoderSpec(**{**fields, "config": TINY}))
    words = ["decoder", "--device", "cpu", "--size", "16", "--batch", "1", "--dtype", "float32", "--repeats", "1"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["direction"] for line in done.stdout.splitlines()] == list(decoder.DIRECTIONS)
    assert "stock" in CliRunner().invoke(app, words).stdout
