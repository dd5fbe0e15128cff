"""IMDb: the same examples from every form on disk, the two protocols, bytes and words, and what is refused."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from arch.errors import ConfigError
from arch.registry import TASKS
from arch.schema import resolve
from experiments.data import imdb_files
from experiments.data.__main__ import main
from experiments.data.imdb import IMDb
from experiments.data.pipeline import eval_batches, train_batches
from experiments.data.store import DataError
from experiments.data.task import data_root

TEXTS = {  # (half, class, number, rating): text; more than ten, so that 10 sorting before 2 would show
    (half, kind, number, 2 if kind == "neg" else 9): f"{half} review {number}, a {kind} café!<br />It's {kind * number}"
    for half, count in (("train", 12), ("test", 11))
    for kind in ("pos", "neg")
    for number in range(count)
}
ORDER = sorted(TEXTS, key=lambda key: (key[0] != "train", key[1] != "neg", key[2]))


def as_folder(root):
    for (half, kind, number, rating), text in TEXTS.items():
        file = root / "aclImdb" / half / kind / f"{number}_{rating}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    unlabelled = root / "aclImdb/train/unsup/0_0.txt"
    unlabelled.parent.mkdir()
    unlabelled.write_text("not a labelled review")


def as_archive(root):
    with tarfile.open(root / "aclImdb_v1.tar.gz", "w:gz") as archive:
        others = {
            "aclImdb/README": "about",
            "aclImdb/train/unsup/0_0.txt": "no label",
            "aclImdb/train/urls_pos.txt": "x",
        }
        files = {f"aclImdb/{half}/{kind}/{n}_{r}.txt": text for (half, kind, n, r), text in TEXTS.items()}
        for name, text in {**others, **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def as_json_lines(root):
    for half in ("train", "test"):
        with gzip.open(root / f"{half}.jsonl.gz", "wt", encoding="utf-8") as file:
            for (name, kind, number, rating), text in TEXTS.items():
                if name == half:
                    line = {"id": f"{half}/{kind}/{number}_{rating}", "label": int(kind == "pos"), "text": text}
                    file.write(json.dumps(line) + "\n")


FORMS = {"folder": as_folder, "archive": as_archive, "json": as_json_lines}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    root = tmp_path_factory.mktemp("imdb")
    as_json_lines(root)
    return root


def task(folder, **options):
    return IMDb(data_dir=str(folder), **{"published": False, "validation_examples": 4, "max_length": 40, **options})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bytes_in_the_same_order(form, tmp_path):
    FORMS[form](tmp_path)
    found = task(tmp_path, protocol="release", max_length=1000)
    got = [found.examples(half)[i] for half in ("train", "test") for i in range(len(found.examples(half)))]
    assert [tokens.tobytes().decode() for tokens, _ in got] == [TEXTS[key] for key in ORDER]
    assert [label for _, label in got] == [int(key[1] == "pos") for key in ORDER]
    assert found.content_hash == "bc55ec198bd560b1eaa44fd4b51bf10d57ee5d7dd7e7697dd821cc1202a05a50"


def test_bytes_are_ids_1_to_256_cut_and_padded(reviews):
    found = task(reviews, protocol="release")
    assert (found.spec.vocab_size, found.spec.num_classes, found.spec.length) == (257, 2, 40)
    for split in found.splits:
        source = found.source(split)
        for i, key in enumerate(key for key in ORDER if key[0] == ("train" if split == "train" else "test")):
            text = TEXTS[key].encode()
            ids = [byte + 1 for byte in text[:40]]
            assert source[i]["inputs"].tolist() == ids + [0] * (40 - len(ids))
            assert source[i]["inputs"].dtype == np.int32, "256 does not fit in a byte"
    assert max(source[i]["inputs"].max() for i in range(11)) == 0xC3 + 1, "é is the bytes C3 A9"


def test_sound_holds_out_a_part_of_train_and_release_validates_on_test(reviews):
    sound, release = task(reviews), task(reviews, protocol="release")
    assert sound.splits == {"train": 20, "validation": 4, "test": 22}
    assert release.splits == {"train": 24, "validation": 22, "test": 22}

    def rows(found, split):
        return {found.source(split)[i]["inputs"].tobytes() for i in range(found.splits[split])}

    assert rows(release, "validation") == rows(release, "test") == rows(sound, "test")
    assert not rows(sound, "train") & rows(sound, "validation")
    assert rows(sound, "train") | rows(sound, "validation") == rows(release, "train")
    assert rows(task(reviews, data_seed=1), "validation") != rows(sound, "validation")
    assert sound.content_hash != release.content_hash != task(reviews, data_seed=1).content_hash
    assert release.chance == release.majority("test") == release.majority("train") == 0.5
    labels = sound.examples("validation").labels
    assert sound.majority("validation") == max(np.mean(labels == 0), np.mean(labels == 1))


def test_words(reviews):
    found = task(reviews, level="words", vocab_size=10)
    texts = [found.examples("train")[i][0] for i in range(20)]
    counts = np.bincount(np.concatenate(texts), minlength=10)
    # each of a, br, café, It, s, train and review once a text, pos and neg by class; ties by code point
    assert (counts[2:9] >= 20).all()
    assert (np.diff(counts[2:9]) <= 0).all()
    assert counts[0] == 0
    assert counts[1] > 0
    whole = task(reviews, level="words", vocab_size=1000, protocol="release")
    ids = imdb_files.vocabulary(
        (imdb_files.words(text.encode()) for key, text in TEXTS.items() if key[0] == "train"), 998
    )
    names = {i: word for word, i in ids.items()}
    for split, half in (("train", "train"), ("validation", "test"), ("test", "test")):
        for i, key in enumerate(key for key in ORDER if key[0] == half):
            words = [word if word in ids else "?" for word in imdb_files.words(TEXTS[key].encode())]
            assert [names.get(token, "?") for token in whole.examples(split)[i][0].tolist()] == words
            assert words[3] == "a"
            assert words[5] == "café"
    assert "?" in {names.get(token, "?") for token in whole.examples("test").tokens.tolist()}
    assert task(reviews, level="words", max_length=3).examples("test").lengths.tolist() == [3] * 22


def test_the_vocabulary_is_of_the_train_split_alone(reviews):
    """A word of the held-out part only is unknown."""
    found = task(reviews, level="words", vocab_size=1000, validation_examples=12)
    kept = {word for i in range(12) for word in found.examples("train")[i][0].tolist()}
    held = {word for i in range(12) for word in found.examples("validation")[i][0].tolist()}
    assert 1 not in kept
    assert held - kept == {1}


def test_batches(reviews):
    found = task(reviews)
    batches = train_batches(found, batch_size=5, seed=0)
    for batch in (next(batches), *eval_batches(found, "test", 5)):
        assert batch["inputs"].shape == batch["keep"].shape == (5, 40)
        assert batch["inputs"].dtype == np.int32
        assert batch["inputs"].max() <= 256
        np.testing.assert_array_equal(batch["keep"], batch["inputs"] > 0)
    batches.close()


def test_missing_data_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no IMDb reviews in .*: take aclImdb_v1.tar.gz .* SHA-256 c40f74a1"):
        task(tmp_path).prepare()
    monkeypatch.setenv("ARCHLOOM_DATA", str(tmp_path / "root"))
    with pytest.raises(DataError, match=str(tmp_path / "root" / "imdb")):
        IMDb().prepare()
    assert IMDb().splits == {"train": 22_500, "validation": 2_500, "test": 25_000}, "known without the data"
    assert IMDb(protocol="release").splits == {"train": 25_000, "validation": 25_000, "test": 25_000}


def test_other_reviews_are_refused_unless_asked_for(reviews):
    with pytest.raises(DataError, match=r"not the published reviews .* 6955e9a6.*task.published"):
        task(reviews, published=True).prepare()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "train/neg/0_3", "label": 1, "text": ""}', r"line 2: id 'train/neg/0_3' with label 1"),
        ('{"id": "train/neg/0_3", "label": 0}', "line 2: not an object"),
        ('{"id": "train/neg/0_3"', "line 2"),
    ],
)
def test_wrong_lines_are_named(line, message, tmp_path):
    good = '{"id": "train/pos/3_9", "label": 1, "text": "fine"}'
    for half in ("train", "test"):
        with gzip.open(tmp_path / f"{half}.jsonl.gz", "wt") as file:
            file.write(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        task(tmp_path).prepare()


@pytest.mark.parametrize("form", ["archive", "json"])
def test_cut_files_are_errors(form, tmp_path):
    FORMS[form](tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match="is damaged"):
        task(tmp_path).prepare()


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"level": "words", "vocab_size": 2}, "task.vocab_size"),
        ({"validation_examples": 25_000}, "task.validation_examples"),
        ({"data_seed": 2**64}, "task.data_seed"),
        ({"level": "char"}, "task.level"),
    ],
)
def test_options_that_contradict(options, path):
    with pytest.raises(ConfigError) as error:
        TASKS.build({"name": "imdb", **resolve(options, TASKS.options("imdb"), "task")}, path="task")
    assert error.value.path == path


def test_the_command_describes_it(reviews, capsys):
    options = ["--published=False", "--validation_examples=4", "--max_length=40"]
    assert main(["imdb", f"--data_dir={reviews}", *options, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["content_hash"] == task(reviews).content_hash
    assert facts["variant"] == str(reviews)
    assert {name: x["examples"] for name, x in facts["splits"].items()} == {
        "train": 20, "validation": 4, "test": 22, "all": 46,
    }  # fmt: skip
    assert facts["splits"]["all"]["length"]["max"] == 40
    assert main(["imdb", f"--data_dir={reviews / 'no'}"]) == 2
    assert capsys.readouterr().err.startswith("no IMDb reviews in ")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"level": "words", "vocab_size": 93_931, "protocol": "release"}])
def test_the_published_reviews(options):
    """93,929 words in the train half; 33,132,823 and 32,350,685 bytes in all (their counts elsewhere)."""
    if not (data_root(None) / "imdb").is_dir():
        pytest.skip("no folder imdb in the data root ($ARCHLOOM_DATA)")
    found = IMDb(**options)
    assert {name: len(found.examples(name)) for name in found.splits} == found.splits
    assert found.majority("test") == 0.5
    if options:
        assert found.examples("train").tokens.max() == 93_930
        assert not (found.examples("train").tokens == 1).any()
    else:
        sizes = {half: x.tokens.size for half, x in imdb_files.read(found.folder).items()}
        assert sizes == {"train": 33_132_823, "test": 32_350_685}
