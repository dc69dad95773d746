"""Methods: what steers the synthesis towards images worth learning from."""

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance

__all__ = ["TeacherGuidance"]
