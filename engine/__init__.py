"""Guided synthesis: a recipe and a request in, labelled images out."""

from synthkd.engine.backends import Execution
from synthkd.engine.batch import Batch
from synthkd.engine.callback import GuidanceCallback
from synthkd.engine.config import CutMixSpec, GuidanceSpec, Recipe, Request
from synthkd.engine.errors import NonFiniteError, SynthkdError
from synthkd.engine.fusion import Fused, fuse, unfuse
from synthkd.engine.guidance import Guidance
from synthkd.engine.image_to_image import Start
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.shards import write_shards
from synthkd.engine.stream import Stream
from synthkd.engine.synthesizer import Synthesizer

__all__ = [
    "Batch",
    "CutMixSpec",
    "Execution",
    "Fused",
    "Guidance",
    "GuidanceCallback",
    "GuidanceSpec",
    "NonFiniteError",
    "Plan",
    "Recipe",
    "Request",
    "Start",
    "Stream",
    "Synthesizer",
    "SynthkdError",
    "WorkUnit",
    "fuse",
    "unfuse",
    "write_shards",
]
