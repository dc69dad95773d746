"""The embedded default: a complete small diffusion pipeline, a teacher and a judge, made by the scripts in build/."""

from pathlib import Path

from synthkd.engine.errors import SynthkdError, suggest

_ROOT = Path(__file__).parent


def embedded_path(name: str, holds: str = "pipeline") -> Path:
    """Folder of an embedded default (`pipeline/`, `teacher.toml`, `judge.toml`, `prompts.toml`) that holds a file."""
    known = sorted(p.name for p in _ROOT.iterdir() if (p / holds).exists())
    if name not in known:
        raise SynthkdError(f"embedded:{name}: no such default; {suggest(name, known)}")
    return _ROOT / name
