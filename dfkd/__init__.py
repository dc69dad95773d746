"""Data-free knowledge distillation: teachers, guidance losses, students, reports."""

from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.student import DistillSpec, distill
from synthkd.dfkd.teachers import Teacher, load_teacher

__all__ = ["DistillSpec", "Teacher", "TeacherGuidance", "distill", "load_teacher"]
