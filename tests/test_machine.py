"""What a run makes of memory that ran out, wherever it ran out."""

from __future__ import annotations

import errno

import pytest
import torch

from llmshrink.errors import InputError, PlanError, ResourceError
from llmshrink.machine import enough_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ],
    ids=repr,
)
def test_an_allocation_that_failed_is_told_behind_any_error(error: Exception) -> None:
    with pytest.raises(ResourceError, match="Memory ran out") as caught, enough_memory():
        raise error
    assert caught.value.exit_code == 6
    with pytest.raises(ResourceError, match="Memory ran out"), enough_memory():
        try:
            raise error
        except Exception as first:
            raise PlanError("it cannot be planned for") from first


@pytest.mark.parametrize("error", [ResourceError("no room"), InputError("damaged"), RuntimeError("shapes"), KeyError()])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, enough_memory():
        raise error
    assert caught.value is error
