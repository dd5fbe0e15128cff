"""LRA's own ListOps files: basic_train.tsv, basic_val.tsv, basic_test.tsv.

Format: a header `Source<TAB>Target`, then an expression in binary bracketing and its value a line, CRLF line ends:

    ( ( ( [MAX 3 ) 4 ) ] )<TAB>4

Parentheses are dropped and `]` is the token X, as LRA's input pipeline does.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.data.listops_generator import CLOSE, FIRST_DIGIT, FIRST_OPERATOR, OPERATORS, TOKENS
from experiments.data.store import DataError
from experiments.data.task import TokenExamples

FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
HEADER = b"Source\tTarget"
CHECKED = 64  # examples a file whose targets are worked out and compared

BAD = 255
IDS = np.full(256, BAD, np.uint8)  # one letter a token: 0-9, the operators as a-d, ]
IDS[list(b"0123456789")] = np.arange(FIRST_DIGIT, FIRST_DIGIT + 10)
IDS[list(b"abcd")] = np.arange(FIRST_OPERATOR, FIRST_OPERATOR + 4)
IDS[ord("]")] = CLOSE
LETTERS = tuple(zip((name.encode() for name in OPERATORS), (b"a", b"b", b"c", b"d")))


def evaluate(tokens: Iterable[int]) -> int:
    """The value of an expression, with a stack. Raises ValueError if it is not one whole expression."""
    stack: list[list[int]] = [[]]
    opened: list[int] = []
    for token in tokens:
        if FIRST_DIGIT <= token < FIRST_OPERATOR:
            stack[-1].append(token - FIRST_DIGIT)
        elif FIRST_OPERATOR <= token < CLOSE:
            opened.append(token - FIRST_OPERATOR)
            stack.append([])
        elif token == CLOSE and opened and stack[-1]:
            args = sorted(stack.pop())
            median = (args[(len(args) - 1) // 2] + args[len(args) // 2]) // 2
            stack[-1].append((args[0], args[-1], median, sum(args) % 10)[opened.pop()])
        else:
            raise ValueError("unbalanced")
    if opened or len(stack[0]) != 1:
        raise ValueError("unbalanced")
    return stack[0][0]


def parse_source(source: bytes) -> np.ndarray:
    """Token ids of a bracketed expression, uint8. Raises ValueError on anything that is not part of one."""
    for name, letter in LETTERS:
        source = source.replace(name, letter)
    tokens = IDS[np.frombuffer(source.translate(None, b"() "), np.uint8)]
    if not tokens.size or (tokens == BAD).any():
        raise ValueError("not a ListOps expression")
    return tokens


def read_file(path: Path, max_length: int) -> TokenExamples:
    """One file. Raises DataError, with the line, if it is not in LRA's format or a target is wrong."""
    pairs: list[tuple[np.ndarray, int]] = []
    with path.open("rb") as file:
        if file.readline().rstrip(b"\r\n") != HEADER:
            raise DataError(f"{path}: the first line is not `Source<TAB>Target`; this is no LRA ListOps file")
        for number, line in enumerate(file, start=2):
            source, tab, target = line.rstrip(b"\r\n").partition(b"\t")
            try:
                tokens = parse_source(source)
                if not tab or len(target) != 1 or not target.isdigit():
                    raise ValueError("the target is not one digit")
                if len(pairs) < CHECKED and evaluate(tokens.tolist()) != int(target):
                    raise ValueError("the target is not the expression's value (LRA's first release was broken so)")
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            if tokens.size > max_length:
                raise DataError(f"{path}, line {number}: {tokens.size} tokens; set task.max_length to that at least")
            pairs.append((tokens, int(target)))
    if not pairs:
        raise DataError(f"{path}: no examples")
    return TokenExamples.pack(pairs)


def read(folder: Path, max_length: int) -> dict[str, TokenExamples]:
    """All three splits."""
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{', '.join(missing)} not in {folder}: take listops-1000 from the lra_release archive linked in the "
            "README of github.com/google-research/long-range-arena and put its basic_*.tsv there, "
            "or set task.tsv_dir to None to generate ListOps"
        )
    return {split: read_file(folder / name, max_length) for split, name in FILES.items()}


def bracketed(tokens: Iterable[int]) -> str:
    """The expression in LRA's binary bracketing: an operator's arguments, then ], are applied one at a time."""
    pieces: list[list[str]] = [[]]  # of each open operator: itself, its arguments so far
    for token in tokens:
        if FIRST_OPERATOR <= token < CLOSE:
            pieces.append([TOKENS[token]])
        elif token == CLOSE:
            operator, *args = [*pieces.pop(), "]"]
            pieces[-1].append("( " * len(args) + operator + " " + " ".join(f"{arg} )" for arg in args))
        else:
            pieces[-1].append(TOKENS[token])
    return pieces[0][0]


def write(folder: Path, splits: dict[str, TokenExamples]) -> None:
    """Writes the splits as LRA's generator does, for programs that read its files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        with (folder / FILES[split]).open("wb") as file:
            file.write(HEADER + b"\r\n")
            for i in range(len(examples)):
                tokens, label = examples[i]
                file.write(f"{bracketed(tokens.tolist())}\t{label}\r\n".encode())
