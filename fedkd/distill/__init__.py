"""Central distillation: a student learns from a teacher by terms."""

from fedkd.distill.distiller import Distiller, accuracy
from fedkd.distill.loop import Epoch, Fit, Records
from fedkd.distill.taps import Taps
from fedkd.distill.teachers import (
    EnsembleTeacher,
    ModuleTeacher,
    OnnxTeacher,
    PredictorTeacher,
    Teacher,
    load_teacher,
)
from fedkd.distill.terms import SigmoidRamp, Term, Warmup

__all__ = [
    "Distiller",
    "EnsembleTeacher",
    "Epoch",
    "Fit",
    "ModuleTeacher",
    "OnnxTeacher",
    "PredictorTeacher",
    "Records",
    "SigmoidRamp",
    "Taps",
    "Teacher",
    "Term",
    "Warmup",
    "accuracy",
    "load_teacher",
]
