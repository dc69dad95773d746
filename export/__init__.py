"""A module -> an artifact -> a callable. Knows nothing of diffusion.

>>> from synthkd import export
>>> compiled = export.build(module, (x,), backend="onnx")
>>> y = compiled(x)
"""

from synthkd.export.artifacts import Manifest, default_store
from synthkd.export.build import Compiled, available, build, load
from synthkd.export.errors import ExportError
from synthkd.export.spec import BACKENDS, Options

__all__ = ["BACKENDS", "Compiled", "ExportError", "Manifest", "Options", "available", "build", "default_store", "load"]
