"""LRA's own ListOps files."""

import pytest

from experiments.data import listops_tsv
from experiments.data.listops import ListOps
from experiments.data.listops_generator import TOKENS, Limits, generate
from experiments.data.store import DataError
from experiments.data.task import TokenExamples

# In LRA's format: the first is ( ( ( [MAX 3 ) 4 ) ] ), worked by hand.
ROWS = [
    ("( ( ( [MAX 3 ) 4 ) ] )", 4),
    ("( ( ( ( [MED 9 ) ( ( ( [SM 8 ) 7 ) ] ) ) 2 ) ] )", 5),
    ("( ( ( [MED 4 ) 7 ) ] )", 5),  # the median of two, rounded down
]


def write(folder, rows=ROWS, ending="\r\n", header="Source\tTarget"):
    text = "".join(line + ending for line in [header, *(f"{source}\t{target}" for source, target in rows)])
    for name in listops_tsv.FILES.values():
        (folder / name).write_bytes(text.encode())


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_reads_lra_files(tmp_path, ending):
    write(tmp_path, ending=ending)
    task = ListOps(tsv_dir=str(tmp_path), max_length=16)
    assert task.splits == {"train": 3, "validation": 3, "test": 3}
    example = task.source("train")[1]
    assert [TOKENS[i] for i in example["inputs"]] == ["[MED", "9", "[SM", "8", "7", "X", "2", "X"] + ["<pad>"] * 8
    assert [task.source("test")[i]["label"] for i in range(3)] == [4, 5, 5]
    assert task.majority("validation") == 2 / 3


def test_writes_lra_files(tmp_path):
    write(tmp_path)
    examples = listops_tsv.read(tmp_path, 100)
    listops_tsv.write(tmp_path / "again", examples)
    for name in listops_tsv.FILES.values():
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_round_trip(tmp_path):
    splits = {
        split: TokenExamples.pack(generate(100, seed, Limits(32, 128))) for seed, split in enumerate(listops_tsv.FILES)
    }
    listops_tsv.write(tmp_path, splits)
    found = listops_tsv.read(tmp_path, 128)
    for split, examples in splits.items():
        assert [(t.tolist(), y) for t, y in examples] == [(t.tolist(), y) for t, y in found[split]]


def test_hash_follows_the_content(tmp_path):
    hashes = []
    for rows in (ROWS, ROWS[:2], ROWS[1::-1]):
        write(tmp_path, rows)
        hashes.append(ListOps(tsv_dir=str(tmp_path)).content_hash)
    assert len(set(hashes)) == 3


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    write(tmp_path)
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"^basic_val.tsv not in .*lra_release.*tsv_dir"):
        ListOps(tsv_dir=str(tmp_path)).prepare()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([("( ( ( [MAX 3 ) 4 ) ] )", 3)], "line 2: the target is not the expression's value"),
        ([*ROWS, ("( ( ( [MAX 3 ) 4 ) ] )", "x")], "line 5: the target is not one digit"),
        ([*ROWS, ("( ( ( [FIRST 3 ) 4 ) ] )", 3)], "line 5: not a ListOps expression"),
        ([*ROWS, ("", 3)], "line 5: not a ListOps expression"),
        ([("( ( [MAX 3 ) 4 )", 4)], "line 2: unbalanced"),
        ([("3 ]", 3)], "line 2: unbalanced"),
        ([(" ".join(["[SM", *["1"] * 30, "]"]), 0)], "line 2: 32 tokens; set task.max_length"),
        ([], "no examples"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, complaint):
    write(tmp_path, rows)
    with pytest.raises(DataError, match=complaint):
        listops_tsv.read_file(tmp_path / "basic_test.tsv", max_length=31)


def test_other_headers_are_refused(tmp_path):
    write(tmp_path, header="text\tlabel")
    with pytest.raises(DataError, match="first line"):
        listops_tsv.read_file(tmp_path / "basic_test.tsv", max_length=31)
