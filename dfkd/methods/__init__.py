"""Methods of data-free distillation (`base.py` says what one is), and the guidance that steers a prior."""

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance

__all__ = ["TeacherGuidance"]
