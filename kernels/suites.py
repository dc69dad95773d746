"""All ops with their cases, for tests and benchmarks."""

from synthkd.kernels.batchnorm_stats.cases import SUITE as BATCHNORM_STATS
from synthkd.kernels.group_norm_silu.cases import ADD_SUITE as ADD_GROUP_NORM_SILU
from synthkd.kernels.group_norm_silu.cases import SUITE as GROUP_NORM_SILU
from synthkd.kernels.guided_step.cases import SUITE as GUIDED_STEP
from synthkd.kernels.kd_loss.cases import SUITE as KD_LOSS
from synthkd.kernels.predict_x0.cases import SUITE as PREDICT_X0
from synthkd.kernels.sum_of_squares.cases import SUITE as SUM_OF_SQUARES
from synthkd.kernels.to_uint8.cases import SUITE as TO_UINT8
from synthkd.kernels.upsample2x_conv3x3.cases import SUITE as UPSAMPLE2X_CONV3X3

SUITES = (
    ADD_GROUP_NORM_SILU,
    BATCHNORM_STATS,
    GROUP_NORM_SILU,
    GUIDED_STEP,
    KD_LOSS,
    PREDICT_X0,
    SUM_OF_SQUARES,
    TO_UINT8,
    UPSAMPLE2X_CONV3X3,
)
