"""The codes and scales that training left of a matrix, as they are.

No recipe names it as a method: `llmshrink distill --qat` does.
"""

from __future__ import annotations

from typing import ClassVar

from llmshrink.methods.base import Task
from llmshrink.methods.keep import Keep


class Qat(Keep):
    """One matrix that was trained through its rounding: like what is exported, somebody else has made it."""

    task: ClassVar[Task] = "distill"
