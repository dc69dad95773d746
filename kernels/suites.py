"""All ops with their cases, for tests and benchmarks."""

from synthkd.kernels.predict_x0.cases import SUITE as PREDICT_X0

SUITES = (PREDICT_X0,)
