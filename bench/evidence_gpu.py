"""Parts of `bench/gpu.py` for the evidence presets: files out of the evaluation pack, priors, runs; all of them go on.

Files lie under $SYNTHKD_DATA (data); what is missing there is made out of the pack, where $SYNTHKD_EVALUATION
(data/pack) has it. Without either there is nothing to run, and one line says so.
"""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from synthkd.bench import cifar_pack, fit_teacher, pacs_pack
from synthkd.bench.evidence import PRIOR_RESULT, Evidence
from synthkd.bench.made_files import check_made
from synthkd.dfkd.fit_prior import PriorFit
from synthkd.dfkd.presets import data_folder, load_preset
from synthkd.dfkd.presets_pacs import POOL, TEACHERS
from synthkd.dfkd.prior_data import load_captioned
from synthkd.dfkd.prior_spec import prior_spec
from synthkd.dfkd.training import Stopped
from synthkd.engine.errors import SynthkdError

TEACHER = TEACHERS["resnet"]
SETS = {"prior-cifar": "cifar10", "prior-pacs": "pacs"}
PRESETS = {"cifar10": "prior-cifar", "pacs-sketch": "prior-pacs"}
# What the large prior of PACS has instead of the size's: images of 128 pixels, an autoencoder of two halvings.
CHANGES: Mapping[str, Mapping[str, Any]] = {"prior-pacs": {"vae_widths": (64, 128, 128)}}
SIDES = {"prior-cifar": 32, "prior-pacs": 128}  # of images, pixels
SEEDS, MINUTES = (0, 1, 2), 8.0  # of one part, which goes on in the next call
_LAST = {"prior-cifar": "teacher/resnet56.toml", "prior-pacs": "test.npz"}  # of the files that are made, to be written
_PACKED = {"prior-cifar": "cifar100_part3.npz", "prior-pacs": "pacs_sketch.npz"}
Parts = dict[str, Callable[[], None]]


def pack_folder() -> Path:
    """The evaluation pack, if it was carried."""
    return Path(os.environ.get("SYNTHKD_EVALUATION", "data/pack"))


def missing(name: str) -> str:
    """Why a prior cannot be trained here, in one line; empty where it can."""
    made, packed = data_folder(SETS[name]) / _LAST[name], pack_folder() / _PACKED[name]
    if made.is_file() or packed.is_file():
        return ""
    return f"{name}: skipped, neither {made} nor {packed} is here (`make {name}` makes the one, the pack has the other)"


def skipped() -> list[str]:
    """Lines on what is left out here."""
    return [line for name in SETS if (line := missing(name))]


def evidence_parts(tell: Callable[[str], None] = print) -> Parts:
    """Priors first, then the presets that draw with them, seed by seed; those whose files are here."""
    found: Parts = {name: partial(prior_part, name, tell=tell) for name in SETS if not missing(name)}
    return found | {
        f"evidence: {preset} seed {seed}": partial(evidence_part, preset, seed, tell=tell)
        for preset, name in PRESETS.items()
        if not missing(name)
        for seed in SEEDS
    }


def prior_part(name: str, device: str = "cuda", tell: Callable[[str], None] = print) -> None:
    """Files, on PACS the teacher, and the large prior; raises Stopped where the time ends first."""
    until = time.monotonic() + 60 * MINUTES
    folder = data_folder(SETS[name])
    make_files(name)
    if name == "prior-pacs":
        _fit_teacher(folder, device, until)
    spec = prior_spec("base", CHANGES.get(name))
    told = PriorFit(
        data=load_captioned(folder / POOL), spec=spec, out=folder / "prior-base", device=device,
        should_stop=lambda: time.monotonic() > until,
    ).execute()  # fmt: skip
    tell(f"{name}: {told['vae']['psnr_held_out']} dB, held-out loss {told['unet']['held_out_loss']}")


def make_files(name: str) -> None:
    """Unpack what presets read, where it is not there yet; raises SynthkdError where it is there in another size."""
    folder = data_folder(SETS[name])
    if not (folder / _LAST[name]).is_file():
        if name == "prior-cifar":
            cifar_pack.make(pack_folder(), folder)
        else:
            pacs_pack.make(pack_folder(), folder, SIDES[name])
    check_made(folder / POOL, SIDES[name])


def _fit_teacher(folder: Path, device: str, until: float) -> None:
    """The sketch teacher, unless it is there; raises Stopped, and SynthkdError where it could not be trained."""
    if (folder / TEACHER).is_file():
        return
    if (left := (until - time.monotonic()) / 60) <= 0:
        raise Stopped
    words = [f"{folder}/train.npz", "--test", f"{folder}/test.npz", "--out", f"{folder}/teacher"]
    code = fit_teacher.main([*words, "--minutes", f"{left:.3f}", "--device", device])
    if code == 75:
        raise Stopped
    if code:
        raise SynthkdError(f"prior-pacs: the teacher's training ended with exit code {code}")


def evidence_part(preset: str, seed: int, device: str = "cuda", tell: Callable[[str], None] = print) -> None:
    """One seed of a preset, its rows appended; raises Stopped where the time ends first, or the prior is not done."""
    folder = data_folder(SETS[PRESETS[preset]])
    if not (folder / "prior-base" / PRIOR_RESULT).is_file():
        tell(f"evidence: {preset}: waits for {PRESETS[preset]}")
        raise Stopped
    until = time.monotonic() + 60 * MINUTES
    job = Evidence(preset=load_preset(preset).on(device), seeds=[seed], out=Path("build/gpu/evidence") / preset,
                   record=True, should_stop=lambda: time.monotonic() > until)  # fmt: skip
    for row in job.execute():
        tell(f"evidence, {preset}: {row['control']}, seed {seed}: {row['student_accuracy']} % in {row['hours']} hours")
