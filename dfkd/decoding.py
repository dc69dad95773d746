"""What a set's guidance looks through: fitted where the recipe leaves it to the set, tried on a group, then frozen.

The decision and the digest of a fitted decoder stand in the manifest; the decoder lies in the set's `decoder/` folder.
A fingerprint knows neither: both are functions of what was declared. A decoder that is lost is fitted anew, and must
come out the same.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkd.dfkd.fit_decoder import FitSpec, Source, Stopped, about, fit_decoder
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.progress import Progress
from synthkd.engine import Request, Synthesizer, SynthkdError
from synthkd.engine.calibration import calibrate
from synthkd.engine.fitted import load_fitted_decoder, save_fitted
from synthkd.engine.index import (
    MANIFEST,
    claim_folder,
    decoder_folder,
    decoder_note,
    found_decoder,
    note_decoder,
    read_manifest,
)
from synthkd.engine.locks import settle_lock
from synthkd.engine.rows import Part
from synthkd.engine.workers import one_thread

FIT = FitSpec()  # of a set's own decoder, with the set's seed
_log = logging.getLogger("synthkd")


def settle_decoder(
    job: SynthJob,
    folder: Path,
    request: Request,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
    part: Part | None = None,
) -> SynthJob | None:
    """The job with its decoder decided, as the manifest has it or now; None if stopped before that.

    Raises SynthkdError where the folder holds another set or is being written, and where fitting a lost decoder anew
    gives another one than the one that the manifest names (another processor or library).
    """
    if not _is_open(job):
        return job
    if (folder / MANIFEST).exists() and (done := _frozen(job, folder)) is not None:
        return done
    synth = job.build()
    declared = {name: value for name, value in synth.identity(request.seed).items() if name != "look"}
    folder.mkdir(parents=True, exist_ok=True)
    with settle_lock(folder, part), one_thread(job.device):
        claim_folder(folder, declared, request.num_samples, job.origin())
        if not decoder_note(read_manifest(folder)) and next(folder.glob("shard-*"), None) is not None:
            note_decoder(folder, _as_begun(job))
        try:
            if job.recipe.guidance.decoder == "auto" and decoder_note(read_manifest(folder)).get("chosen") != "vae":
                _ensure_fitted(job, synth, folder, request.seed, progress, should_stop)
        except Stopped:
            return None
        if "chosen" not in decoder_note(read_manifest(folder)):
            _decide(job, synth, folder, request.seed)
    return obey(job, folder)


def _is_open(job: SynthJob) -> bool:
    """Whether there is something to decide."""
    spec = job.recipe.guidance
    if spec.scale == 0 or job.look is not None or job.recipe.resolved_decoder() == "vae":
        return False
    return spec.decoder == "auto" or spec.min_cosine > 0


def obey(job: SynthJob, folder: Path) -> SynthJob:
    """The job as its set's manifest decided; unchanged where that decided nothing.

    Raises SynthkdError where the set's own decoder is missing or damaged.
    """
    note = decoder_note(read_manifest(folder))
    if job.recipe.guidance.scale == 0 or "chosen" not in note:
        return job
    if note["chosen"] == "vae":
        return replace(job, look="vae")
    if note["asked"] != "auto":
        return job
    where = decoder_folder(folder)
    if found_decoder(folder) != note.get("sha256"):
        raise SynthkdError(
            f"{where}: the decoder that the set's guidance looked through is missing or damaged; run the command that "
            "drew the set again, which fits it anew"
        )
    return replace(job, look=f"fitted:{where.absolute()}")


def _frozen(job: SynthJob, folder: Path) -> SynthJob | None:
    """The job as the manifest decided for this very decoder; None where it did not, or the set's decoder is lost."""
    note = decoder_note(read_manifest(folder))
    if note.get("asked") != job.recipe.guidance.decoder or "chosen" not in note:
        return None
    try:
        return obey(job, folder)
    except SynthkdError:
        return None


def _as_begun(job: SynthJob) -> dict[str, Any]:
    """The decision of a set that was begun from Python, where nothing is fitted or tried: it goes on as it began."""
    spec = job.recipe.guidance
    kind = "vae" if spec.decoder == "auto" else spec.decoder.partition(":")[0]
    return {"asked": spec.decoder, "chosen": kind, "threshold": spec.min_cosine}


def _ensure_fitted(
    job: SynthJob,
    synth: Synthesizer,
    folder: Path,
    seed: int,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> None:
    """The set's own decoder lies in its folder, and its digest stands in the manifest."""
    note = decoder_note(read_manifest(folder))
    known = note.get("sha256")
    if known is not None and found_decoder(folder) == known:
        return
    guidance = synth.guidance
    assert isinstance(guidance, TeacherGuidance)
    source = Source(synth.model, job.recipe, guidance.teacher.input_size, guidance)
    fitted = fit_decoder(source, replace(FIT, seed=seed), progress, should_stop)
    save_fitted(fitted.net, decoder_folder(folder), about(source, fitted))
    found = found_decoder(folder)
    if known is not None and found != known:
        raise SynthkdError(
            f"{folder}: the set's decoder was lost, and fitting it anew gave another one (another processor or "
            "library?); draw the set again in a new folder"
        )
    note_decoder(folder, {**note, "asked": "auto", "sha256": found})


def _decide(job: SynthJob, synth: Synthesizer, folder: Path, seed: int) -> None:
    """Calibrate, unless the recipe trusts any decoder, and write what is chosen into the manifest."""
    spec, full, note = job.recipe.guidance, synth.model.decoder, decoder_note(read_manifest(folder))
    kind = job.recipe.resolved_decoder().partition(":")[0]
    decision: dict[str, Any] = {"asked": spec.decoder, "chosen": kind, "threshold": spec.min_cosine}
    if spec.min_cosine > 0:
        cheap = synth.look
        if spec.decoder == "auto":
            where = str(decoder_folder(folder))
            cheap = load_fitted_decoder(where, device=synth.model.device, dtype=synth.model.dtype, like=full)
        found = calibrate(synth, cheap, full, seed)
        decision |= {"cosine": found.mean, "cosines": list(found.cosines)}
        decision["chosen"] = kind if found.chosen == "cheap" else "vae"
    note_decoder(folder, {**note, **decision})
    _log.info("%s", said(decision))


def said(note: Mapping[str, Any]) -> str:
    """A decision in one line, for people."""
    names = {"fitted": "a fitted decoder", "tiny": "a tiny autoencoder", "pooled": "the VAE on pooled latents"}
    asked = "fitted" if note["asked"] == "auto" else note["asked"].partition(":")[0]
    name = names.get(asked, asked)
    if "cosine" not in note:
        return f"guidance looks through {name if note['chosen'] != 'vae' else 'the full VAE'}, unchecked"
    found = f"mean cosine with the VAE's gradient {note['cosine']:.2f}"
    if note["chosen"] == "vae":
        return f"guidance looks through the full VAE: for {name}, {found} is below {note['threshold']:g}"
    return f"guidance looks through {name} ({found}; at least {note['threshold']:g} was asked for)"
