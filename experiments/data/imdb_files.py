"""The IMDb Large Movie Review Dataset as it is found on disk.

Source: Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis", ACL. 25,000 reviews to train on and 25,000 to
test on, half of each negative (label 0) and half positive (label 1). A folder is read in the first of these forms that
it has:

    aclImdb/{train,test}/{neg,pos}/NUMBER_RATING.txt    as published, or the folder aclImdb itself
    aclImdb_v1.tar.gz                                   as published, packed
    train.jsonl.gz, test.jsonl.gz                       {"id": "train/neg/0_3", "label": 0, "text": ...} a line

All give the same bytes in the same order: negative before positive, each by number. A text is the bytes of its file;
in JSON its UTF-8 form.
"""

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments.data.store import DataError
from experiments.data.task import TokenExamples

ARCHIVE = "aclImdb_v1.tar.gz"
HALVES = ("train", "test")
CLASSES = ("neg", "pos")
SIZE = 25_000  # reviews in each half
HASH = "6955e9a6858e705035bc8c95a462ca2505a0f9c6a9a3a199e2eba85173832f3b"  # content hash, both halves whole
NAME = re.compile(r"(?:.*/)?(train|test)/(neg|pos)/(\d+)_(\d+)(?:\.txt)?")
FETCH = (
    f"take {ARCHIVE} (84,125,825 bytes, SHA-256 c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe) from "
    "ai.stanford.edu/~amaas/data/sentiment and put it there, packed or unpacked, or name its folder in task.data_dir"
)

Review = tuple[str, int, int, int, bytes]  # half, class, number, rating, text


def read(folder: Path) -> dict[str, TokenExamples]:
    """Both halves, whole texts, a byte a token. Raises DataError."""
    reviews = sorted(_find(folder), key=lambda review: review[:4])
    halves = {}
    for half in HALVES:
        rows = [(np.frombuffer(text, np.uint8), label) for name, label, _, _, text in reviews if name == half]
        if not rows:
            raise DataError(f"{folder}: no reviews of the {half} half; {FETCH}")
        halves[half] = TokenExamples.pack(rows)
    return halves


def _find(folder: Path) -> Iterator[Review]:
    for root in (folder / "aclImdb", folder):
        if (root / HALVES[0] / CLASSES[0]).is_dir():
            return _folder(root)
    if (folder / ARCHIVE).is_file():
        return _archive(folder / ARCHIVE)
    files = [folder / f"{half}.jsonl.gz" for half in HALVES]
    if all(file.is_file() for file in files):
        return (review for file in files for review in _json_lines(file))
    raise DataError(f"no IMDb reviews in {folder}: {FETCH}")


def _review(name: str, text: bytes) -> Review | None:
    found = NAME.fullmatch(name)
    if found is None:
        return None
    half, kind, number, rating = found.groups()
    return half, CLASSES.index(kind), int(number), int(rating), text


def _folder(root: Path) -> Iterator[Review]:
    for half in HALVES:
        for kind in CLASSES:
            for file in (root / half / kind).glob("*.txt"):
                if (review := _review(f"{half}/{kind}/{file.name}", file.read_bytes())) is not None:
                    yield review


def _archive(file: Path) -> Iterator[Review]:
    try:
        with tarfile.open(file, "r|gz") as archive:
            for member in archive:
                content = archive.extractfile(member) if NAME.fullmatch(member.name) else None
                if content is not None and (review := _review(member.name, content.read())) is not None:
                    yield review
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file} is damaged ({error}); {FETCH}") from error


def _json_lines(file: Path) -> Iterator[Review]:
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                number += 1
                yield _parsed(line)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}, line {number}: {error}") from error
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file} is damaged ({error})") from error


def _parsed(line: str) -> Review:
    found = json.loads(line)
    if not isinstance(found, dict) or not {"id", "label", "text"} <= found.keys():
        raise ValueError('not an object {"id", "label", "text"}')
    review = _review(str(found["id"]), str(found["text"]).encode())
    if review is None or review[1] != found["label"]:
        raise ValueError(f"id {found['id']!r} with label {found['label']!r}; expected such as train/neg/0_3 with 0")
    return review


WORD = re.compile(r"\W+")


def words(text: bytes) -> list[str]:
    """Runs of letters, digits and underscores, case kept: the release's tokens [tensorflow-datasets' Tokenizer]."""
    return [word for word in WORD.split(text.decode("utf-8")) if word]


def vocabulary(texts: Iterable[list[str]], size: int) -> dict[str, int]:
    """The `size` most frequent words, ids from 2; equally frequent ones by their code points."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in text:
            counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate(ranked[:size], start=2)}
