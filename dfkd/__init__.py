"""Data-free knowledge distillation: teachers, guidance losses, students, reports."""

from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.student import DistillSpec, distill
from synthkd.dfkd.teachers import Teacher, load_teacher

__all__ = ["DistillSpec", "SynthJob", "Teacher", "TeacherGuidance", "distill", "draw_set", "load_teacher"]
