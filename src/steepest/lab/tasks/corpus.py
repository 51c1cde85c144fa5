"""Text corpora: bytes in a reproducible order, split by file into training, validation and test data."""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import LabError

# These are not typical source code: tests are repetitive, codec tables and pydoc's topics are data, and
# the rest is third-party packages.
_STDLIB_SKIP = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
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
        digest = hashlib.sha256(self.train)
        for name, text in (("validation", self.validation), ("test", self.test)):
            digest.update(f"\0{name}\0".encode())
            digest.update(text)
        return digest.hexdigest()[:12]


def standard_library(max_bytes: int = 16_000_000) -> Corpus:
    """Read the source of the running Python's standard library.

    Args:
        max_bytes: Maximum number of bytes to read. Files are read in sorted order.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    version = sysconfig.get_python_version()
    paths = [path for path in _walk(root, _STDLIB_SKIP) if path.suffix == ".py"]
    return _corpus(f"Python {version} standard library", root, paths, max_bytes)


def from_path(path: Path, max_bytes: int = 256_000_000) -> Corpus:
    """Read a file, or every text file under a directory (without hidden and binary files).

    Args:
        path: The file or directory.
        max_bytes: Maximum number of bytes to read. Files are read in sorted order.

    Raises:
        LabError: the path does not exist, cannot be read, or has no text.
    """
    if path.is_file():
        return _corpus(str(path), path.parent, [path], max_bytes)
    if path.is_dir():
        return _corpus(str(path), path, list(_walk(path, frozenset())), max_bytes)
    raise LabError(f"no such file or directory: {path}")


def _why_no_text(paths: list[Path]) -> str:
    """Explain why files have no text, by the example of the first one."""
    if not paths:
        return ": all files are hidden, or there are none"
    with paths[0].open("rb") as file:
        start = file.read(8192)
    if not start:
        return f": {paths[0].name} is empty"
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return (
            f": {paths[0].name} is UTF-16, whose zero bytes make it look binary; convert it to UTF-8 first "
            f"(iconv -f UTF-16 -t UTF-8)"
        )
    return f": {paths[0].name} contains zero bytes, so it is a binary file"


def _walk(root: Path, skip: frozenset[str]) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(root):
        # Modified in place, because os.walk descends into the directories of this list in its order.
        subdirectories[:] = sorted(n for n in subdirectories if n not in skip and not n.startswith("."))
        for name in sorted(files):
            path = Path(directory) / name
            if not name.startswith(".") and path.is_file():
                yield path


def _read(paths: list[Path], root: Path, max_bytes: int) -> dict[str, bytes]:
    texts: dict[str, bytes] = {}
    remaining = max_bytes
    for path in paths:
        if remaining <= 0:
            break
        try:
            with path.open("rb") as file:
                text = file.read(remaining)
        except OSError as error:
            raise LabError(f"cannot read {path}: {error.strerror or error}") from error
        if text and b"\0" not in text[:8192]:
            texts[path.relative_to(root).as_posix()] = text
            remaining -= len(text)
    return texts


def _corpus(source: str, root: Path, paths: list[Path], max_bytes: int) -> Corpus:
    texts = _read(paths, root, max_bytes)
    if not texts:
        raise LabError(f"no text in {source}{_why_no_text(paths)}")
    sizes = {name: len(text) for name, text in texts.items()}
    validation = _choose_held_out(sizes, set())
    test = _choose_held_out(sizes, validation)
    if validation and test:
        splits = [b"".join(texts[name] for name in texts if name in names) for names in (validation, test)]
        train = b"".join(text for name, text in texts.items() if name not in validation | test)
        return Corpus(source, train, splits[0], splits[1], len(texts), len(validation | test))
    # There are too few files to hold some out: hold out the end of each file instead.
    ends = [
        {name: round(size * (1 - share * _HELD_OUT)) for name, size in sizes.items()} for share in (2, 1, 0)
    ]
    starts = [dict.fromkeys(sizes, 0), *ends]
    parts = [
        b"".join(text[start[name] : end[name]] for name, text in texts.items())
        for start, end in zip(starts, ends, strict=False)
    ]
    return Corpus(source, parts[0], parts[1], parts[2], len(texts), 0)


def _choose_held_out(sizes: dict[str, int], taken: set[str]) -> set[str]:
    """Choose files with about a twentieth of the bytes by the hashes of their names.

    Hashes make the choice reproducible on every machine and independent of the alphabetical order.
    """
    total = sum(sizes.values())
    chosen: set[str] = set()
    chosen_bytes = 0
    for name in sorted(sizes.keys() - taken, key=_hash):
        if chosen_bytes >= _HELD_OUT * total:
            break
        # Skip a file that would make the held-out data twice as large as intended.
        if chosen_bytes + sizes[name] <= 2 * _HELD_OUT * total:
            chosen.add(name)
            chosen_bytes += sizes[name]
    return chosen


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()
