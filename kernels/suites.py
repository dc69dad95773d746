"""All ops with their cases, for tests and benchmarks."""

from synthkd.kernels.guided_step.cases import SUITE as GUIDED_STEP
from synthkd.kernels.predict_x0.cases import SUITE as PREDICT_X0
from synthkd.kernels.sum_of_squares.cases import SUITE as SUM_OF_SQUARES

SUITES = (GUIDED_STEP, PREDICT_X0, SUM_OF_SQUARES)
