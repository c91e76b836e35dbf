"""What training left of a matrix, as it is.

No recipe names it as a method: the stages that train do.
"""

from __future__ import annotations

from typing import ClassVar

from llmshrink.methods.base import Task
from llmshrink.methods.cut import Cut


class Trained(Cut):
    """One matrix of a model that was trained as a whole: like what a surgery left, somebody else has made it."""

    task: ClassVar[Task] = "distill"
