"""Text as bytes, read the same way every time and split by file."""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import LabError

# Not the language a reader would write: tests repeat themselves, codec tables and pydoc's topics
# are data, and the rest are other people's packages.
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
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to judge by, which share no file (or, of a single file, no byte)."""

    source: str
    train: bytes
    held_out: bytes
    files: int
    held_out_files: int

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change when the text does."""
        digest = hashlib.sha256(self.train)
        digest.update(b"\0held out\0")
        digest.update(self.held_out)
        return digest.hexdigest()[:12]


def standard_library(max_bytes: int = 16_000_000) -> Corpus:
    """The source of the running Python's standard library.

    Args:
        max_bytes: Stop reading here. Files are taken in sorted order.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    version = sysconfig.get_python_version()
    paths = [path for path in _walk(root, _STDLIB_SKIP) if path.suffix == ".py"]
    return _corpus(f"Python {version} standard library", root, paths, max_bytes)


def from_path(path: Path, max_bytes: int = 256_000_000) -> Corpus:
    """A file, or every text file under a folder (hidden and binary files are left out).

    Args:
        path: The file or folder.
        max_bytes: Stop reading here. Files are taken in sorted order.

    Raises:
        LabError: nothing is there, it cannot be read, or it holds no text.
    """
    if path.is_file():
        return _corpus(str(path), path.parent, [path], max_bytes)
    if path.is_dir():
        return _corpus(str(path), path, list(_walk(path, frozenset())), max_bytes)
    raise LabError(f"no such file or folder: {path}")


def _why_no_text(paths: list[Path]) -> str:
    """What can be said of files that gave no text, the first of them in particular."""
    if not paths:
        return ": there is no file that is not hidden"
    with paths[0].open("rb") as file:
        begins = file.read(8192)
    if not begins:
        return f": {paths[0].name} is empty"
    if begins[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return (
            f": {paths[0].name} is UTF-16, whose zero bytes make it binary here; convert it first "
            f"(iconv -f UTF-16 -t UTF-8)"
        )
    return f": {paths[0].name} has zero bytes, as binary files have; text in UTF-8 has none"


def _walk(root: Path, skip: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        # In place: os.walk descends into what is left of this list, in its order.
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path


def _read(paths: list[Path], root: Path, max_bytes: int) -> dict[str, bytes]:
    texts: dict[str, bytes] = {}
    room = max_bytes
    for path in paths:
        if room <= 0:
            break
        try:
            with path.open("rb") as file:
                text = file.read(room)
        except OSError as error:
            raise LabError(f"cannot read {path}: {error.strerror or error}") from error
        if text and b"\0" not in text[:8192]:
            texts[path.relative_to(root).as_posix()] = text
            room -= len(text)
    return texts


def _corpus(source: str, root: Path, paths: list[Path], max_bytes: int) -> Corpus:
    texts = _read(paths, root, max_bytes)
    if not texts:
        raise LabError(f"no text in {source}{_why_no_text(paths)}")
    held_out = _choose_held_out({name: len(text) for name, text in texts.items()})
    if held_out:
        train = b"".join(text for name, text in texts.items() if name not in held_out)
        judge = b"".join(text for name, text in texts.items() if name in held_out)
    else:
        # Too few files to spare one: the end of each is held out instead.
        cuts = {name: round(len(text) * (1 - _HELD_OUT)) for name, text in texts.items()}
        train = b"".join(text[: cuts[name]] for name, text in texts.items())
        judge = b"".join(text[cuts[name] :] for name, text in texts.items())
    return Corpus(source, train, judge, len(texts), len(held_out))


def _choose_held_out(sizes: dict[str, int]) -> set[str]:
    """Names of files that make up about a tenth of the bytes, chosen by the hash of their names.

    A name's hash knows neither the alphabet nor the machine, so the choice is fixed and impartial.
    """
    total = sum(sizes.values())
    chosen: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=_hash):
        if taken >= _HELD_OUT * total:
            break
        # A file so big that it would take more than twice its due stays in training.
        if taken + sizes[name] <= 2 * _HELD_OUT * total:
            chosen.add(name)
            taken += sizes[name]
    return chosen


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()
