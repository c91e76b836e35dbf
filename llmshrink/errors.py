"""Every way a run can end badly, each with the exit code a script can act on.

    LlmshrinkError                1   an internal error: a bug in llmshrink
    |- UsageError                 2   an option that does not exist or does not fit the command
    |- RecipeError                3   the recipe does not validate (all problems at once)
    |- PlanError                  3   a valid recipe that this model cannot be given (layers named)
    |- ModelNotFoundError         4   no such model, gated, or no network
    |- UnsafeError                5   refused for safety: pickle, remote code, a path out of the folder
    |- ResourceError              6   not enough memory or disk
    |- OutputError                7   the output exists, or another run holds it
    |- InputError                 8   bad input: corrupt weights, NaN, empty calibration
    |- GateError                  9   finished, but a gate or --strict failed
    `- InterruptedRun            12   stopped by a signal; the same command goes on where it was

0 is success and 130 a second interrupt. A message says where, what, and what to do.
"""

from __future__ import annotations


class LlmshrinkError(Exception):
    """Base of all errors that llmshrink raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(LlmshrinkError):
    """An option that does not exist or does not fit the command."""

    exit_code = 2


class RecipeError(LlmshrinkError):
    """A recipe that does not validate; `problems` holds one line for each fault found."""

    exit_code = 3

    def __init__(self, message: str, problems: list[str] | None = None, *, hint: str | None = None) -> None:
        self.problems = problems or []
        super().__init__("\n".join([message, *(f"  - {p}" for p in self.problems)]), hint=hint)


class PlanError(LlmshrinkError):
    """A valid recipe that cannot be carried out on this model."""

    exit_code = 3


class ModelNotFoundError(LlmshrinkError):
    """No such model or dataset, no permission, or no network."""

    exit_code = 4


class UnsafeError(LlmshrinkError):
    """Something in the model or the recipe could run code or reach out of its folder."""

    exit_code = 5


class ResourceError(LlmshrinkError):
    """Not enough memory or disk."""

    exit_code = 6


class OutputError(LlmshrinkError):
    """The output folder exists already, or another run is writing it."""

    exit_code = 7


class InputError(LlmshrinkError):
    """Weights, tokenizer or text that cannot be used as they are."""

    exit_code = 8


class GateError(LlmshrinkError):
    """The run finished, but a quality gate or `--strict` says no."""

    exit_code = 9


class InterruptedRun(LlmshrinkError):  # noqa: N818 - it is not an error: the journal holds what was done
    """Stopped by a signal at a block boundary; the same command resumes."""

    exit_code = 12
