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
        folder: Where new ones go.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, spare: Path) -> None:
        """Begin with nothing found.

        Args:
            folder: holds those of all models.
            identity: what decides the costs.
            spare: in its place, once nothing more can be written there.
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder, self._spare, self._name = folder, spare, f"sensitivity-{digest[:32]}"
        self.found = 0

    def get(self, part: int) -> dict[str, list[float]] | None:
        """The costs of a part's units by their names; None where they were not measured, or the file is damaged."""
        for path in dict.fromkeys((self._path(part), self._spare / self._path(part).name)):
            kept = unsealed(path.read_bytes()) if path.is_file() else None
            if isinstance(kept, dict):
                self.found += 1
                return kept
        return None

    def put(self, part: int, costs: dict[str, list[float]]) -> None:
        """Keep the costs of a part."""
        try:
            write_bytes(self._path(part), sealed(costs))
        except OSError:
            if self.folder == self._spare:
                raise
            self.folder = self._spare
            self.put(part, costs)

    def _path(self, part: int) -> Path:
        return self.folder / f"{self._name}-{part}"
