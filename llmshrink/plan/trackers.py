"""The trackers of transformers' Trainer, and what each of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from llmshrink.errors import PlanError

# Of each: the packages of which one must be there, and what installs it.
PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not there: training would end at its beginning.

    Raises:
        PlanError: one is missing.
    """
    missing = [PACKAGES[name][1] for name in names if not any(map(find_spec, PACKAGES[name][0]))]
    if missing:
        raise PlanError(
            f"train.report_to names trackers that are not installed: {', '.join(missing)}.",
            hint=f"pip install {' '.join(missing)}",
        )
