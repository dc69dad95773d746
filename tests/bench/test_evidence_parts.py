"""Files, priors and runs of the evidence in parts that go on: on a GPU machine, and by make."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkd.bench import evidence_gpu, gpu
from synthkd.bench.made_files import check_made, main
from synthkd.dfkd.prior_spec import prior_spec
from synthkd.dfkd.training import Stopped
from synthkd.engine import SynthkdError


def test_gpu_parts_are_of_what_was_carried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without files one line says so; with a pack or made files there are parts, and evidence waits for its prior."""
    monkeypatch.setenv("SYNTHKD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SYNTHKD_EVALUATION", str(tmp_path / "pack"))
    assert evidence_gpu.evidence_parts() == {}
    assert [line.split(":")[0] for line in evidence_gpu.skipped()] == ["prior-cifar", "prior-pacs"]
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/pacs_sketch.npz").touch()
    card = tmp_path / "data/cifar10/teacher/resnet56.toml"
    card.parent.mkdir(parents=True)
    card.touch()
    parts = evidence_gpu.evidence_parts()
    assert list(parts)[:2] == ["prior-cifar", "prior-pacs"]
    assert {"evidence: cifar10 seed 2", "evidence: pacs-sketch seed 0"} <= parts.keys() <= gpu.parts().keys()
    with pytest.raises(Stopped):
        parts["evidence: cifar10 seed 0"]()


def test_a_prior_part_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The base size into prior-base, after the files and, on PACS, the teacher; asked to stop in time."""
    monkeypatch.setenv("SYNTHKD_DATA", str(tmp_path))
    did: list[Any] = []

    class Fit:
        def __init__(self, **given: Any) -> None:
            did.append((given["out"], given["spec"]))
            self.should_stop = given["should_stop"]

        def execute(self) -> dict[str, Any]:
            if self.should_stop():
                raise Stopped
            return {"vae": {"psnr_held_out": 30}, "unet": {"held_out_loss": 0.2}}

    def teach(words: list[str]) -> int:
        did.append(words[0])
        left.append(float(words[words.index("--minutes") + 1]))
        return codes.pop()

    codes, left = [0, 75], list[float]()
    monkeypatch.setattr(evidence_gpu, "PriorFit", Fit)
    monkeypatch.setattr(evidence_gpu, "load_captioned", lambda path: path)
    monkeypatch.setattr(evidence_gpu, "check_made", lambda *_: None)
    monkeypatch.setattr(evidence_gpu.pacs_pack, "make", lambda pack, folder, side: did.append((folder, side)))
    monkeypatch.setattr(evidence_gpu.fit_teacher, "main", teach)
    with pytest.raises(Stopped):
        evidence_gpu.prior_part("prior-pacs", "cpu")
    evidence_gpu.prior_part("prior-pacs", "cpu")
    assert 0 < min(left) <= max(left) <= evidence_gpu.MINUTES
    monkeypatch.setattr(evidence_gpu, "MINUTES", 0.0)
    with pytest.raises(Stopped):
        evidence_gpu.prior_part("prior-pacs", "cpu")
    pacs = tmp_path / "pacs"
    once = [(pacs, 128), f"{pacs}/train.npz"]
    base = (pacs / "prior-base", prior_spec("base", {"vae_widths": [64, 128, 128]}))
    assert did == [*once, *once, base, (pacs, 128)]


def test_files_of_another_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line where the pool has another side, no captions, or is none; its images are not read."""
    pool = tmp_path / "pool.npz"
    np.savez(pool, x=np.zeros((2, 64, 64, 3), np.uint8), captions=np.array(["sea"]))
    assert main([str(pool), "--side", "64"]) == 0
    assert main([str(pool), "--side", "128"]) == 2
    assert "images are 64x64; this size of prior takes 128x128" in capsys.readouterr().err
    np.savez(pool, x=np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(SynthkdError, match="has no captions"):
        check_made(pool, 64)
    pool.write_bytes(b"PK")
    with pytest.raises(SynthkdError, match="not readable"):
        check_made(pool, 64)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_goes_on_until_a_prior_is_done(tmp_path: Path) -> None:
    """Exit code 75 is tried again, any other ends it; without files and PACK one line says what to do."""
    root, tools = Path(__file__).resolve().parents[2], tmp_path / "bin"
    tools.mkdir()
    (tmp_path / ".ready").touch()
    script = '#!/bin/sh\necho "$@" >> {log}\nn=$(wc -l < {log})\n[ $n -ge 3 ] || exit 75\nexit {code}\n'

    def make(code: int, **variables: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "log").unlink(missing_ok=True)
        (tools / "synthkd").write_text(script.format(log=tmp_path / "log", code=code))
        (tools / "python").write_text("#!/bin/sh\nexit 0\n")
        for tool in ("synthkd", "python"):
            (tools / tool).chmod(0o755)
        given = {"VENV": str(tmp_path), "DATA": str(tmp_path / "data"), **variables}
        words = ["make", "-C", str(root), "prior-cifar", *(f"{k}={v}" for k, v in given.items())]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)

    told = make(0)
    assert told.returncode == 2
    assert "name the evaluation pack" in told.stderr
    (tmp_path / "data/cifar10/teacher").mkdir(parents=True)
    (tmp_path / "data/cifar10/teacher/resnet56.toml").touch()
    assert make(0, SIZE="base").returncode == 0
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == 3
    assert all("--minutes 9" in call and call.endswith("--minutes 9") and "prior-base" in call for call in calls)
    assert make(2).returncode == 2
