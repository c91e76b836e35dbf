"""The embedded model: a small Llama trained on generated stories, for trying every command offline and in seconds."""

from __future__ import annotations

from pathlib import Path

from llmshrink.demo.generator import CALIBRATION_SEED, EVALUATION_SEED, TRAIN_SEED, stories

NAME = "llmshrink/demo-stories"  # the name that users see
MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["CALIBRATION_SEED", "EVALUATION_SEED", "MODEL_DIR", "NAME", "TRAIN_SEED", "stories"]
