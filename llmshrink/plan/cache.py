"""How a teacher's words are kept on disk, how many bytes of a position that takes, and whose they must be."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmshrink.errors import InputError, PlanError
from llmshrink.formats.sets import bytes_of_set
from llmshrink.io.files import parse_json
from llmshrink.model.source import Source
from llmshrink.model.words import tokens_hash
from llmshrink.recipe.cache import CacheSpec
from llmshrink.recipe.distill import DistillStage

FACTS, VERSION = "cache.json", 1
AGAIN = "Remove the folder, and the cache is made again; or copy it once more from where it was made."
MOST = 120  # bytes of a position, where nobody says how many tokens are kept
LOG, SCALAR = 1, 4  # bytes of the code of a token's log chance, and of a number of a position, float32
ROW = 16 + 4  # bytes that a row is found by, and its length
SHARE = 1  # byte of a position for what stands around: rows, headers
SHARD = 8192  # tokens of a shard, which go through the teacher together


@dataclass(frozen=True)
class Kind:
    """What decides the words of a position.

    Attributes:
        method: sampled or topk.
        tokens: Kept of each position.
        temperature: At which they are chosen.
        vocabulary: Tokens of which chances are; those of padding that one of the models lacks are cut off.
    """

    method: Literal["sampled", "topk"]
    tokens: int
    temperature: float
    vocabulary: int

    @classmethod
    def of(cls, spec: CacheSpec, temperature: float, vocabulary: int) -> Kind:
        """What a recipe asks for."""
        kinds = (cls(spec.method, n, temperature, vocabulary) for n in range(min(MOST, vocabulary), 0, -1))
        most = next(kind for kind in kinds if kind.position_bytes <= MOST - SHARE)
        return most if spec.tokens is None else replace(most, tokens=min(spec.tokens, vocabulary))

    @property
    def set_bytes(self) -> int:
        """Bytes of the numbers of a position's tokens."""
        return bytes_of_set(self.tokens, self.vocabulary)

    @property
    def drawn(self) -> bool:
        """Whether tokens stand for others: a position has a threshold."""
        return self.method == "sampled"

    @property
    def softened(self) -> bool:
        """Whether chances at temperature 1 do not say those they were chosen by: a position has a shift."""
        return self.temperature != 1

    @property
    def position_bytes(self) -> int:
        """Bytes of a position."""
        return self.set_bytes + LOG * self.tokens + SCALAR * (self.drawn + self.softened)

    def bytes(self, rows: int, positions: int) -> int:
        """About so many of a whole cache."""
        return rows * ROW + positions * self.position_bytes + positions // 8 + 4096


@dataclass(frozen=True)
class Keeping:
    """Where a teacher's words are kept.

    Attributes:
        kind: Of the words.
        folder: Of a cache with a name; None: in the run's folder of work.
        found: What `cache.json` there says; None: it is still to be made.
        teacher: Who makes it; None: nobody who is here.
        seed: Of what is drawn.
    """

    kind: Kind
    folder: Path | None
    found: dict[str, Any] | None
    teacher: Source | None
    seed: int

    def facts(self, text: str) -> dict[str, Any]:
        """What decides every byte of a cache; `text` is the fingerprint of the rows."""
        assert self.teacher is not None
        name = self.teacher.id
        return {
            "version": VERSION,
            "kind": asdict(self.kind),
            "teacher": Path(name).name if Path(name).exists() else name,  # no path of this machine
            "teacher_files": self.teacher.hashes,
            "tokenizer": tokens_hash(self.teacher),
            "text": text,
            "seed": self.seed,
        }


def keeping(stage: DistillStage, student: Source, teacher: Source | None) -> Keeping | None:
    """What is kept by a recipe; None: nothing, the teacher is asked.

    Args:
        stage: what the recipe says.
        student: who learns.
        teacher: who teaches; None: nobody who is here, a cache must be.

    Raises:
        PlanError: the cache that is there is another one than is asked for.
        InputError: it is damaged.
    """
    if stage.cache is None:
        return None
    folder = None if stage.cache.folder is None else Path(stage.cache.folder).expanduser().resolve()
    found = None if folder is None else read_facts(folder)
    known = 1 + max(student.tokenizer.get_vocab().values())  # what a model has beyond is padding
    wide = min(known, *(_vocabulary(one) for one in (student, teacher) if one is not None))
    kind, seed = Kind.of(stage.cache, stage.loss.temperature, wide), stage.train.seed
    if found is None:
        return Keeping(kind, folder, None, teacher, seed)
    there, asked = Kind(**found["kind"]), stage.cache.tokens
    pairs = {
        "method": (there.method, kind.method),
        "temperature": (there.temperature, kind.temperature),
        "tokens of a position": (there.tokens, there.tokens if asked is None else kind.tokens),
        "vocabulary": (there.vocabulary, min(there.vocabulary, _vocabulary(student))),
        "tokenizer": (found["tokenizer"][:12], tokens_hash(student)[:12]),
    }
    if wrong := [f"its {name} is {has}, and {wants} is wanted" for name, (has, wants) in pairs.items() if has != wants]:
        raise PlanError(
            f"{folder} holds another cache: {'; '.join(wrong)}.", hint="Ask for that, or name another cache.folder."
        )
    return Keeping(there, folder, found, teacher, seed)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What `cache.json` says; None: there is none.

    Raises:
        InputError: it is damaged, or of a version that is not known.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = parse_json(path.read_bytes())
        if found["version"] != VERSION:
            raise InputError(f"{path} is of version {found['version']}, and {VERSION} is known.")
        kind = Kind(**found["kind"])
        if kind.method not in ("sampled", "topk") or not all(n > 0 for n in (*vars(kind).values(),)[1:]):
            raise ValueError("of an unknown kind")
        _ = [found[key] for key in ("teacher", "teacher_files", "tokenizer", "covered", "seconds", "positions")]
        _ = [(shard["file"], shard["sha256"]) for shard in found["shards"]]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is no description of a cache ({error}).", hint=AGAIN) from error
    return found


def _vocabulary(source: Source) -> int:
    size: int = source.config.get_text_config(decoder=True).vocab_size
    return size
