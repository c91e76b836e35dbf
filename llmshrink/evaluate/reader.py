"""A foreign reader: load a folder with plain transformers, in a process of its own, and say what was found there.

Nothing of llmshrink takes part in reading, so what comes back is what any user of the folder gets. Each request has a
fresh child, forked from a server that has imported transformers once: a crash, a hang or a full memory ends in an
error text, memory is measured from a clean level, and later requests do not pay for the imports. What comes back
through the pipe is JSON and the raw bytes of the output; nothing in it is executed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Collection
from multiprocessing.connection import Connection

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

SERVER_IMPORTS = ["llmshrink.evaluate.foreign"]
GRACE = 5.0  # seconds for a child that has answered to leave by itself
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # schedulers and terminals send them to all processes of a job
# What says nothing about the folder: a kill, or 255 where the process that forks and waits for readers was ended.
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGHUP, *(-number for number in STOPS), 255)


class ReadRequest(BaseModel):
    """What to read and what to measure; sizes are small, everything runs in one process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    tokens: list[list[int]] | None = None  # rows of one length whose output comes back
    dtype: str = "auto"  # "float32" computes in float32 whatever the checkpoint's dtype; "auto" as stored
    round_inputs: bool = True  # False: where the folder says that inputs are rounded, they are not
    prompt: list[int] | None = None  # token ids to continue greedily, where the model predicts the next one
    max_new_tokens: int = 48
    speed: bool = False
    device: str = "cpu"
    adapter: str | None = None  # a folder that peft loads beside the model
    classes: int | None = None  # read it with a head for so many, which the adapter brings
    nested: bool | None = None  # read the model as NF4, its scales in 8 bits or not; None: as it is stored


class Found(BaseModel):
    """The numbers of a reading; None is what was not asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: str
    missing: list[str]  # in the model, not in the folder: transformers fills them with random values
    unexpected: list[str]  # in the folder, not in the model: transformers drops them
    mismatched: list[str]
    load_seconds: float
    loaded_bytes: int  # parameters, buffers and tables, each once, after a forward pass: some readers decompress there
    peak_bytes: int  # resident memory above the level after the imports; mapped weights counted
    device_bytes: int | None = None  # peak allocated on the accelerator
    output_shape: list[int] | None = None
    prefill_tokens_per_second: float | None = None  # of one forward pass over a row
    decode_tokens_per_second: float | None = None
    sample: str | None = None  # the continuation, without the prompt

    def misplaced(self, known: Collection[str] = ()) -> list[str]:
        """Tensors without a place and places without a tensor, but for those `known` from the source."""
        return [*(name for name in (*self.missing, *self.unexpected) if name not in known), *self.mismatched]


class ReadResult(BaseModel):
    """What the reader found, or why it could not: exactly one of `found` and `error` is given.

    Attributes:
        unable: The reader was killed or took too long: that says nothing about the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    found: Found | None = None
    output: Tensor | None = None  # logits, class logits or hidden states: float32 [rows, T, width], on the CPU
    error: str | None = None
    unable: bool = False


def measure(requests: list[ReadRequest], timeout: float = 1800.0) -> list[ReadResult]:
    """Read each folder in a child process of its own, one after the other.

    Args:
        requests: What to read; the answers come in this order.
        timeout: Seconds for each request; the first of a process also pays for the imports (about 10 s).

    Returns:
        One result per request. A failure of any kind is an `error` text, never an exception.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_IMPORTS)
    results = []
    for request in requests:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, request.model_dump_json(), torch.get_num_threads())
        child = context.Process(target=_answer, args=arguments, daemon=True)
        try:
            child.start()
        except (EOFError, OSError) as failed:  # a signal to the whole job ended the process that forks readers
            receiver.close()
            results.append(ReadResult(error=f"no reader could be started: {type(failed).__name__}", unable=True))
            continue
        finally:
            sender.close()  # the child holds the only other end: when it dies, the pipe says so
        try:
            results.append(_receive(receiver, request, timeout))
        except EOFError:
            child.join()
            error = f"the reader of {request.folder} died: {_cause(child.exitcode)}"
            results.append(ReadResult(error=error, unable=child.exitcode in FROM_OUTSIDE))
        finally:
            receiver.close()
            child.join(GRACE if results and results[-1].error is None else 0)
            child.kill()
            child.join()
    return results


def _receive(receiver: Connection, request: ReadRequest, timeout: float) -> ReadResult:
    if not receiver.poll(timeout):
        return ReadResult(error=f"the reader of {request.folder} gave no answer within {timeout:g} s", unable=True)
    result = ReadResult.model_validate_json(receiver.recv_bytes())
    if result.found is None or result.found.output_shape is None:
        return result
    raw = torch.frombuffer(bytearray(receiver.recv_bytes()), dtype=torch.float32)
    return result.model_copy(update={"output": raw.view(result.found.output_shape)})


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, often a sign that memory ran out" if name == "SIGKILL" else name


def _answer(sender: Connection, request: str, threads: int) -> None:
    """In the child: silence the libraries, read, send. Signals to a job go to both; only the parent answers to them."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(threads)
    try:
        from huggingface_hub import constants
        from transformers.utils import logging

        constants.HF_HUB_OFFLINE = True  # kernels are fetched without asking whether files are local
        logging.disable_progress_bar()  # a bar makes a semaphore, which a killed child would leave behind
        result = read(ReadRequest.model_validate_json(request))
    except Exception as error:  # whatever a library raises is the answer
        result = ReadResult(error=f"{type(error).__name__}: {error}")
    sender.send_bytes(result.model_dump_json(exclude={"output"}).encode())
    if result.output is not None:
        sender.send_bytes(result.output.numpy().tobytes())


def read(request: ReadRequest) -> ReadResult:
    """Read a folder in this process. Raises whatever the libraries raise."""
    from llmshrink.evaluate import foreign  # seconds of imports, which only the child should pay for

    return foreign.read(request)


__all__ = ["Found", "ReadRequest", "ReadResult", "measure", "read"]
