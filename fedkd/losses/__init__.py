"""Losses as pure functions of tensors.

Functions return one value per record [B]; take the mean with ``batch.mean``. Classes are the published losses, each a
frozen function that returns a scalar: see :class:`fedkd.losses.base.Loss`.
"""

from fedkd.losses.base import UNKNOWN, Loss, TrainedLoss
from fedkd.losses.contrastive import CRD, CompositionalContrast, InfoNCE
from fedkd.losses.dense import (
    ChannelWise,
    Detection,
    FeatureImitation,
    HeadDistillation,
    PixelCrossEntropy,
    PixelKD,
)
from fedkd.losses.exemplar import PrototypeAlignment
from fedkd.losses.feature import AttentionTransfer, FitNet, ReviewKD
from fedkd.losses.graph import ContextRanking, RepresentationSimilarity
from fedkd.losses.relation import (
    CorrelationCongruence,
    ProbabilisticTransfer,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
)
from fedkd.losses.response import (
    DIST,
    DKD,
    KD,
    BetaJensenShannon,
    CrossEntropy,
    LogitRegression,
    LogitStandardisedKD,
    absolute_error,
    cross_entropy,
    entropy,
    kl_divergence,
    soft_cross_entropy,
    squared_error,
)

LOSSES: dict[str, type[Loss]] = {
    "ce": CrossEntropy,
    "kd": KD,
    "logits": LogitRegression,
    "dkd": DKD,
    "dist": DIST,
    "lskd": LogitStandardisedKD,
    "beta_js": BetaJensenShannon,
    "fitnet": FitNet,
    "at": AttentionTransfer,
    "reviewkd": ReviewKD,
    "rkd_distance": RKDDistance,
    "rkd_angle": RKDAngle,
    "sp": SimilarityPreserving,
    "pkt": ProbabilisticTransfer,
    "cc": CorrelationCongruence,
    "crd": CRD,
    "infonce": InfoNCE,
    "ccl": CompositionalContrast,
    "similarity": RepresentationSimilarity,
    "context_ranking": ContextRanking,
    "prototypes": PrototypeAlignment,
    "pixel_ce": PixelCrossEntropy,
    "pixel_kd": PixelKD,
    "cwd": ChannelWise,
    "fpn": FeatureImitation,
    "detection": Detection,
    "head": HeadDistillation,
}
"""Losses by the short names that experiments use."""

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "LOSSES",
    "UNKNOWN",
    "AttentionTransfer",
    "BetaJensenShannon",
    "ChannelWise",
    "CompositionalContrast",
    "ContextRanking",
    "CorrelationCongruence",
    "CrossEntropy",
    "Detection",
    "FeatureImitation",
    "FitNet",
    "HeadDistillation",
    "InfoNCE",
    "LogitRegression",
    "LogitStandardisedKD",
    "Loss",
    "PixelCrossEntropy",
    "PixelKD",
    "ProbabilisticTransfer",
    "PrototypeAlignment",
    "RKDAngle",
    "RKDDistance",
    "RepresentationSimilarity",
    "ReviewKD",
    "SimilarityPreserving",
    "TrainedLoss",
    "absolute_error",
    "cross_entropy",
    "entropy",
    "kl_divergence",
    "soft_cross_entropy",
    "squared_error",
]
