"""All ops with their cases, for tests and benchmarks."""

from synthkd.kernels.kd_loss.cases import SUITE as KD_LOSS
from synthkd.kernels.predict_x0.cases import SUITE as PREDICT_X0
from synthkd.kernels.to_uint8.cases import SUITE as TO_UINT8

SUITES = (
    KD_LOSS,
    PREDICT_X0,
    TO_UINT8,
)
