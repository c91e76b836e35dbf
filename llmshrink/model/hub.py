"""A model from the Hub: one commit of it, only the files that are wanted, in the Hub's own cache."""

from __future__ import annotations

import time
from pathlib import Path

from llmshrink.errors import InputError, LlmshrinkError, ModelNotFoundError, ResourceError
from llmshrink.io.files import NO_ROOM
from llmshrink.io.safetensors import refuse_pickles

WANTED = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
# The same weights in another layout, or a part; folders such as 1_Pooling are of sentence-transformers.
UNWANTED = ["[!0-9]*/*", "consolidated*", "adapter_*", "*.fp16.*"]
WAITS = (1, 2, 4, 8)  # seconds between attempts while the Hub is busy
BUSY = (408, 429, 500, 502, 503, 504)


def download(model_id: str, revision: str | None) -> Path:
    """The folder of a model in the Hub's cache, named by its commit; downloads what is missing.

    Raises:
        ModelNotFoundError: no such model or revision, no permission, or no network.
        UnsafeError: the model has only pickled weights.
        InputError: a file came with another length than the Hub lists.
        ResourceError: the disk is full.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    check_token()
    waits = iter(WAITS)
    while True:
        try:
            found = snapshot_download(model_id, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)
            folder = Path(found)
            if not any(folder.glob("*.safetensors")):
                refuse_pickles(model_id, HfApi().list_repo_files(model_id, revision=folder.name))
            return folder
        except LlmshrinkError:
            raise
        except Exception as error:  # noqa: BLE001 - the Hub's own, those of its HTTP client and of Xet, and OS errors
            cause = error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error
            # The client waits for a busy Hub by itself, but not where it asks which commit a revision is.
            wait = next(waits, None) if _status(cause) in BUSY else None
            if wait is None:
                raise _explain(model_id, revision or "main", cause) from error
        time.sleep(wait)


def check_token() -> None:
    """Refuse a token that cannot be sent: the HTTP client would quote it in its error, and so in a traceback.

    Raises:
        ModelNotFoundError: the token holds blanks or characters that are not printable ASCII.
    """
    from huggingface_hub import get_token

    token = get_token() or ""
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ModelNotFoundError(
            "The token for the Hub holds characters that no token has.",
            hint="Correct HF_TOKEN, or run `hf auth login`.",
        )


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error tells of."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(model_id: str, revision: str, error: BaseException) -> LlmshrinkError:
    """What a failed download means to the user."""
    from huggingface_hub import constants, errors

    status = _status(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return ResourceError(f"{constants.HF_HUB_CACHE} has no room for {model_id}.", hint="Free some, or set HF_HOME.")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        message = f"{model_id}: the Hub sent a file that is not as long as it lists, and it was not kept."
        return InputError(message, hint="Run again; if it stays, a proxy or mirror between is at fault.")
    if isinstance(error, errors.GatedRepoError):
        message = f"{model_id} is gated, and you may not read it."
        hint = "Ask for access on its page, then run `hf auth login` or set HF_TOKEN."
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"{model_id} has no revision {revision!r}."
        hint = "Its page lists branches and tags; without --revision it is main."
    elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        message = f"There is no folder {model_id!r} here, and no such model on the Hub, or it is private."
        hint = "Check the name (owner/name); for a private model run `hf auth login` or set HF_TOKEN."
    elif status in (401, 403):
        message = f"The Hub refused to give {model_id} (HTTP {status})."
        hint = "Your token is not valid or may not read it: run `hf auth login`, or correct HF_TOKEN."
    elif status is not None:
        message = f"The Hub could not give {model_id} (HTTP {status})."
        hint = "Run again later; files that are complete are kept."
    elif constants.is_offline_mode() or isinstance(error, errors.LocalEntryNotFoundError):
        message = f"There is no folder {model_id!r} here, and the Hub's cache has not all of its revision {revision!r}."
        hint = "Check the spelling, or unset HF_HUB_OFFLINE to download it."
    else:
        message = (
            f"There is no folder {model_id!r} here, and the Hub ({constants.ENDPOINT}) could not be reached or broke "
            f"off ({type(error).__name__})."
        )
        hint = "Check the spelling and the network, and run again; files that are complete are kept."
    return ModelNotFoundError(message, hint=hint)
