from __future__ import annotations

from pathlib import Path

import pytest

from steepest.lab import LabError
from steepest.lab.tasks.corpus import Corpus, from_path, standard_library


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Forty files, each repeating a byte of its own, so that every byte identifies its file."""
    for index in range(40):
        directory = tmp_path / f"part{index % 3}"
        directory.mkdir(exist_ok=True)
        (directory / f"{index:02d}.txt").write_bytes(bytes([128 + index]) * (100 + index))
    return tmp_path


def test_the_split_is_by_file_and_complete(library: Path) -> None:
    corpus = from_path(library)
    parts = [corpus.train, corpus.validation, corpus.test]
    # The sets are disjoint, because together they are complete.
    assert sum(len(set(part)) for part in parts) == 40 == len(set(b"".join(parts)))
    total = sum(100 + index for index in range(40))
    assert sum(map(len, parts)) == total
    assert len(set(corpus.validation)) + len(set(corpus.test)) == corpus.held_out_files
    for part in parts[1:]:
        assert 0.05 <= len(part) / total <= 0.1


def test_the_split_does_not_follow_the_alphabetical_order(library: Path) -> None:
    held_out = sorted(set(from_path(library).validation))
    assert held_out != list(range(128, 128 + len(held_out)))
    assert held_out != list(range(168 - len(held_out), 168))


def test_the_split_does_not_depend_on_the_location(
    library: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    # Create the files in reverse order, because the file system's order must not matter.
    for path in sorted(library.rglob("*.txt"), reverse=True):
        target = elsewhere / path.relative_to(library)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    here, there = from_path(library), from_path(elsewhere)
    assert (here.train, here.validation, here.test) == (there.train, there.validation, there.test)
    assert here.fingerprint == there.fingerprint


def test_the_fingerprint_depends_on_the_split() -> None:
    splits = [(b"abc", b"d", b"e"), (b"ab", b"cd", b"e"), (b"abc", b"e", b"d"), (b"abc", b"de", b"")]
    assert len({Corpus("", *parts, 1, 0).fingerprint for parts in splits}) == 4


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(1, 201)))
    corpus = from_path(path)
    assert corpus.train + corpus.validation + corpus.test == bytes(range(1, 201))
    assert (len(corpus.validation), len(corpus.test)) == (10, 10)


def test_a_file_with_most_of_the_text_is_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"b" * 10_000)
    for name in "stuvwxyz":
        (tmp_path / name).write_bytes(b"s" * 300)
    corpus = from_path(tmp_path)
    assert b"b" in corpus.train
    assert set(corpus.validation) == set(corpus.test) == set(b"s")


def test_hidden_and_binary_files_are_skipped(library: Path) -> None:
    before = from_path(library)
    (library / ".git").mkdir()
    (library / ".git" / "config").write_text("secret")
    (library / ".hidden").write_text("secret")
    (library / "picture").write_bytes(b"\x89PNG\0\0")
    assert from_path(library) == before


def test_reading_stops_at_the_maximum(library: Path) -> None:
    corpus = from_path(library, max_bytes=1234)
    assert len(corpus.train + corpus.validation + corpus.test) == 1234


@pytest.mark.parametrize("content", [None, b""])
def test_missing_text_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(LabError, match="no text in"):
        from_path(tmp_path)
    with pytest.raises(LabError, match="no such file"):
        from_path(tmp_path / "missing")


def test_a_utf16_file_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("utf-16"))
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(LabError, match=r"no text in .*UTF-16 \(iconv -f UTF-16 -t UTF-8"):
            from_path(path)


def test_the_standard_library_is_source_without_tests_and_packages() -> None:
    corpus = standard_library()
    assert len(corpus.train) > 2_000_000
    assert b"import" in corpus.validation
    assert b"import" in corpus.test
    text = corpus.train + corpus.validation + corpus.test
    for excluded in (b"class NewTensorBase", b"codec generated from"):
        assert excluded not in text
