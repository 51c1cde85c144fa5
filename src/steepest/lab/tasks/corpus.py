"""Text corpora: bytes in a reproducible order, split by file into training, validation and test data."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import LabError

# These are not typical source code: tests are repetitive, codec tables and pydoc's topics are data, and
# the rest is third-party packages.
_STDLIB_SKIP = re.compile(
    "__pycache__|dist-packages|encodings|ensurepip|idlelib|lib2to3|pydoc_data|site-packages|tests?|turtledemo"
)
_HELD_OUT = 0.05
"""The fraction of the bytes in the validation data, and in the test data."""


@dataclass(frozen=True)
class Corpus:
    """Training, validation and test bytes, which share no file; bytes of a single file do not overlap."""

    source: str
    train: bytes
    validation: bytes
    test: bytes
    files: int
    held_out_files: int

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of a hash of the text and its split."""
        parts = (self.train, b"\0validation\0", self.validation, b"\0test\0", self.test)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def standard_library() -> Corpus:
    """Read the source of the running Python's standard library, up to 16 MB of files in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    version = sysconfig.get_python_version()
    paths = [path for path in _walk(root, _STDLIB_SKIP) if path.suffix == ".py"]
    return _corpus(f"Python {version} standard library", root, paths, 16_000_000)


def from_path(path: Path, max_bytes: int = 256_000_000) -> Corpus:
    """Read a file, or every text file under a directory (without hidden and binary files).

    Files are read in sorted order, up to `max_bytes` together.

    Raises:
        LabError: the path does not exist, cannot be read, or has no text.
    """
    if not path.exists():
        raise LabError(f"no such file or directory: {path}")
    paths, root = ([path], path.parent) if path.is_file() else ([*_walk(path)], path)
    return _corpus(str(path), root, paths, max_bytes)


def _walk(root: Path, skip: re.Pattern[str] | None = None) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(root):
        # Modified in place, because os.walk descends into the directories of this list in its order.
        subdirectories[:] = sorted(
            name for name in subdirectories if name[0] != "." and not (skip and skip.fullmatch(name))
        )
        for name in sorted(files):
            path = Path(directory) / name
            if not name.startswith(".") and path.is_file():
                yield path


def _corpus(source: str, root: Path, paths: list[Path], max_bytes: int) -> Corpus:
    texts: dict[str, bytes] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                text = file.read(max_bytes)
        except OSError as error:
            raise LabError(f"cannot read {path}: {error.strerror}") from error
        if text and b"\0" not in text[:8192]:
            texts[path.relative_to(root).as_posix()] = text
            max_bytes -= len(text)
    if not texts:
        raise LabError(
            f"no text in {source}: its files are hidden, empty, or hold zero bytes, as binary files do and "
            "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it), or there are none"
        )
    sizes = {name: len(text) for name, text in texts.items()}
    validation = _choose_held_out(sizes, set())
    test = _choose_held_out(sizes, validation)
    if validation and test:
        splits = (texts.keys() - validation - test, validation, test)
        parts = [[text for name, text in texts.items() if name in names] for names in splits]
    else:
        # There are too few files to hold some out: hold out the end of each file instead.
        cuts = (1.0, 2 * _HELD_OUT, _HELD_OUT, 0.0)
        parts = [
            [text[round(len(text) * (1 - a)) : round(len(text) * (1 - b))] for text in texts.values()]
            for a, b in pairwise(cuts)
        ]
        validation = test = set()
    joined = [b"".join(part) for part in parts]
    return Corpus(source, joined[0], joined[1], joined[2], len(texts), len(validation | test))


def _choose_held_out(sizes: dict[str, int], taken: set[str]) -> set[str]:
    """Choose files with about a twentieth of the bytes by the hashes of their names.

    Hashes make the choice reproducible on every machine and independent of the alphabetical order.
    """
    target = _HELD_OUT * sum(sizes.values())
    chosen: set[str] = set()
    chosen_bytes = 0
    for name in sorted(sizes.keys() - taken, key=lambda n: hashlib.sha256(os.fsencode(n)).digest()):
        # Skip a file that would make the held-out data twice as large as intended.
        if chosen_bytes < target and chosen_bytes + sizes[name] <= 2 * target:
            chosen.add(name)
            chosen_bytes += sizes[name]
    return chosen
