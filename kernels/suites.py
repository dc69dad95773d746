"""All ops with their cases, for tests and benchmarks."""

from synthkd.kernels.batchnorm_stats.cases import SUITE as BATCHNORM_STATS
from synthkd.kernels.group_norm_silu.cases import ADD_SUITE as ADD_GROUP_NORM_SILU
from synthkd.kernels.group_norm_silu.cases import SUITE as GROUP_NORM_SILU
from synthkd.kernels.predict_x0.cases import SUITE as PREDICT_X0

SUITES = (ADD_GROUP_NORM_SILU, BATCHNORM_STATS, GROUP_NORM_SILU, PREDICT_X0)
