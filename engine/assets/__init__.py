"""The embedded default: a complete small diffusion pipeline, a teacher and a judge, made by the scripts in build/."""

from pathlib import Path

from synthkd.engine.errors import SynthkdError, suggest

_ROOT = Path(__file__).parent


def embedded_path(name: str) -> Path:
    """Folder of an embedded default (`pipeline/`, `teacher.toml`, `judge.toml`, `prompts.toml`)."""
    known = sorted(p.name for p in _ROOT.iterdir() if (p / "pipeline").is_dir())
    if name not in known:
        raise SynthkdError(f"embedded:{name}: no such default; {suggest(name, known)}")
    return _ROOT / name
