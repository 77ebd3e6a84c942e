"""Distillation without anybody's data: the inputs are made from the teacher alone."""

from fedkd.distill.datafree.base import Form, Maker, Synthesizer, divergence
from fedkd.distill.datafree.catalogue import METHODS, build, resolve
from fedkd.distill.datafree.generators import ImageGenerator, LatentGenerator, TableGenerator, generator, renew
from fedkd.distill.datafree.guides import AnswersGuide, Guide, ModelsGuide, guide
from fedkd.distill.datafree.loop import DataFree
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.datafree.probing import ProbingGuide
from fedkd.distill.datafree.statistics import Statistics, norm_layers

__all__ = [
    "METHODS",
    "AnswersGuide",
    "DataFree",
    "Form",
    "Guide",
    "ImageGenerator",
    "LatentGenerator",
    "Maker",
    "ModelsGuide",
    "Pool",
    "ProbingGuide",
    "Statistics",
    "Synthesizer",
    "TableGenerator",
    "build",
    "divergence",
    "generator",
    "guide",
    "norm_layers",
    "renew",
    "resolve",
]
