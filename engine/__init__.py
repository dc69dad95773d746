"""Guided synthesis: a recipe and a request in, labelled images out."""

from synthkd.engine.config import CutMixSpec, GuidanceSpec, Recipe, Request
from synthkd.engine.errors import NonFiniteError, SynthkdError
from synthkd.engine.guidance import Guidance
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.shards import write_shards
from synthkd.engine.synthesizer import Batch, Stream, Synthesizer

__all__ = [
    "Batch",
    "CutMixSpec",
    "Guidance",
    "GuidanceSpec",
    "NonFiniteError",
    "Plan",
    "Recipe",
    "Request",
    "Stream",
    "Synthesizer",
    "SynthkdError",
    "WorkUnit",
    "write_shards",
]
