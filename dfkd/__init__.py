"""Data-free knowledge distillation: teachers, guidance losses, students, reports."""

from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.online import OnlineImages, distill_online
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.student import DistillSpec, TrainOptions, distill
from synthkd.dfkd.teachers import Teacher, load_teacher

__all__ = [
    "DistillSpec",
    "OnlineImages",
    "SynthJob",
    "Teacher",
    "TeacherGuidance",
    "TrainOptions",
    "distill",
    "distill_online",
    "draw_set",
    "load_teacher",
    "open_set",
]
