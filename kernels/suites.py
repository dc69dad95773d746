"""All ops with their cases, for tests and benchmarks."""

from synthkd.kernels.predict_x0.cases import SUITE as PREDICT_X0
from synthkd.kernels.upsample2x_conv3x3.cases import SUITE as UPSAMPLE2X_CONV3X3

SUITES = (PREDICT_X0, UPSAMPLE2X_CONV3X3)
