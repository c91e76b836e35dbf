"""What was measured of a model's candidates, kept for a run that was killed and for another size of the same model.

One file for each part of the model, written whole or not at all, whose name stands for all that decides the numbers:
what is found there holds.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llmshrink.io.files import sealed, unsealed, write_bytes


class Kept:
    """The costs of a model's units, part by part.

    Attributes:
        found: How many parts were there already.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """`folder` holds those of all models; `identity` is what decides the costs."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._folder, self._name = folder, f"sensitivity-{digest[:32]}"
        self.found = 0

    def get(self, part: int) -> dict[str, list[float]] | None:
        """The costs of a part's units by their names; None where they were not measured, or the file is damaged."""
        path = self._path(part)
        kept = unsealed(path.read_bytes()) if path.is_file() else None
        if not isinstance(kept, dict):
            return None
        self.found += 1
        return kept

    def put(self, part: int, costs: dict[str, list[float]]) -> None:
        """Keep the costs of a part."""
        write_bytes(self._path(part), sealed(costs))

    def _path(self, part: int) -> Path:
        return self._folder / f"{self._name}-{part}"
