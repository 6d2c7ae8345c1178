"""Mixtures (parts/records.py): sources with amounts, what each brings, and training on them."""
import json
import re

import pytest
from conftest import chat, lines, noise, run_script

import data as data_module
from parts.records import Records


@pytest.fixture
def write(tmp_path):
    """write(name, n) -> the path of n samples of text alone, whose ids are name_0, name_1, ..."""
    def file(name, n, folder=""):
        (tmp_path / folder).mkdir(exist_ok=True)
        records = [{"id": f"{name}_{i}", "conversations": chat(f"What is {i}?", f"It is {i}.")}
                   for i in range(n)]
        (tmp_path / folder / name).write_text(json.dumps(records))
        return str(tmp_path / folder / name)
    return file


def ids(sources, *how):
    records = Records(sources, *how)
    return [records[i]["id"] for i in range(len(records))]


# -----------------------------------------------------------------------------
# How much of a source


@pytest.mark.parametrize("amount, n", [("", 40), ("=1.0", 40), ("=0.5", 20), ("=.1", 4), ("=1", 1),
                                       ("=0.33", 13), ("=2.5", 100), ("=100", 100)])
def test_an_amount_is_a_share_with_a_dot_or_a_count(amount, n, write):
    """More than all: every sample some times over, and the rest once more."""
    drawn = ids([write("a.json", 40) + amount])
    times = {drawn.count(f"a.json_{i}") for i in range(40)}
    assert len(drawn) == n
    assert times <= {n // 40, -(-n // 40)}, f"some samples come oftener than others: {times}"


def test_what_is_drawn_of_a_source_depends_on_it_and_the_seed_alone(write):
    """Who adds a source, or moves files, trains on the same samples; less is part of more."""
    a, b, moved = write("a.json", 50), write("b.json", 60), write("a.json", 50, "elsewhere")
    alone = ids([f"{a}=0.4"], 7)
    assert alone == ids([f"{a}=20"], 7) == ids([f"{moved}=0.4"], 7)
    both = ids([f"{b}=0.5", f"{a}=0.4"], 7)
    assert len(both) == 50 and both[30:] == alone, "another source changed the draw of this one"
    assert alone == sorted(alone, key=lambda i: int(i.split("_")[1])), "the order is lost"
    assert set(alone) <= set(ids([f"{a}=0.6"], 7)), "a larger share is another one"
    assert alone != ids([f"{a}=0.4"], 8), "the seed does nothing"
    numbers = [[i.split("_")[1] for i in ids([f"{path}=25"], 7)]
               for path in (a, write("c.json", 50))]
    assert numbers[0] != numbers[1], "two files of the same length lose the same samples"


def test_a_drawn_sample_is_named_by_its_place_in_the_file(write):
    """file[index] in a message is where one finds the sample, whatever was drawn."""
    records = Records([write("a.json", 30) + "=11", write("b.json", 9) + "=20"])
    for i in range(len(records)):
        name, index = re.fullmatch(r"(\w\.json)\[(\d+)\] \(id .*\)", records.where(i)).groups()
        assert records[i]["id"] == f"{name}_{index}" and records.source(i)[1] == int(index)
    assert (records.counts, records.totals) == ([11, 20], [30, 9])


@pytest.mark.parametrize("source, error", [
    ("a.json=0", "share .*or a count"), ("a.json=half", "no such file; .*share"),
    ("a.json=-3", "share"), ("a.json=", "share"), ("gone.json=0.5", "No such file .*gone.json"),
    ("a.json=0.001", "nothing would be left of its 40 samples")])
def test_a_wrong_amount_is_an_error(source, error, write, tmp_path):
    """What was typed, and what may be."""
    write("a.json", 40)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        Records([str(tmp_path / source)])


def test_a_file_whose_name_holds_an_equals_sign_is_that_file(write):
    """What exists under the name as typed is meant."""
    path = write("lr=0.5", 8)
    assert len(ids([path])) == 8 and len(ids([f"{path}=0.5"])) == 4


# -----------------------------------------------------------------------------
# What each source brings


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("one.png", "exact.jpg", "exact.png"):
        noise().save(folder / name)
    return str(folder)


@pytest.fixture
def mixture(images, tmp_path, write):
    """--data of 12 samples with pictures, one missing and 3 renamed, and 30 of text alone."""
    names = ["exact.jpg"] * 8 + ["one.jpg"] * 3 + ["gone.jpg"]
    records = [{"id": f"vqa_{i}", "image": name,
                "conversations": chat(f"<image>\nWhat is {i}?", "A thing.", "Why?", "So.")}
               for i, name in enumerate(names)]
    (tmp_path / "vqa.json").write_text(json.dumps(records))
    return [str(tmp_path / "vqa.json"), write("text.json", 30)]


def test_missing_and_renamed_pictures_are_counted_for_each_source(mixture, images, capsys):
    """A folder that was not unpacked is seen in the line of its source."""
    assert data_module.main(["check", *mixture, "--images", images, "--workers", "0"]) == 1
    printed = capsys.readouterr().out
    assert ("vqa.json: 12 samples, 1 bad, 1 images missing, 0 text only, 3 found under another "
            "name") in printed
    assert "text.json: 30 samples, 0 bad, 0 images missing, 30 text only" in printed
    assert "vqa.json[11] (id vqa_11): image 'gone.jpg' is not in " in printed


def test_pictures_and_text_alone_train_together(parts, images, mixture, tmp_path):
    """Diss. Sec. 4.3: batches of text alone give W no gradient, and no error. Here twice the
    pictures' samples, and half of the text."""
    argv = ["--data", mixture[0] + "=24", mixture[1] + "=0.5", "--images", images, "--skip_bad",
            "--vision", parts / "clip", "--llm", parts / "llm", "--template", "llava_v0", "--lr",
            "2e-2", "--global_batch_size", 2, "--workers", 0, "--out", "out"]
    code, printed = run_script(tmp_path, "train.py", *argv)
    assert code == 0, printed[-3000:]
    assert "vqa.json: 24 samples drawn from 12, 2 bad, 2 images missing" in printed
    assert "text.json: 15 samples drawn from 30, 0 bad, 0 images missing, 15 text only" in printed
    log = lines(tmp_path / "out" / "log.jsonl")
    images = [record["images"] for record in log]
    assert len(log) == 19 and sum(images) == 22 and 0 in images
    assert all(0 < record["loss"] < float("inf") for record in log)


def test_copies_of_what_is_held_out_are_not_trained_on(write):
    """Of a source that is repeated, the validation loss would be that of trained samples."""
    from parts.check import hold_out
    records = Records([write("a.json", 20) + "=60", write("b.json", 20)])
    train_on, held_out = hold_out(records, {}, 6, seed=0)
    one, other = ({records[int(i)]["id"] for i in part} for part in (train_on, held_out))
    assert any(i.startswith("a") for i in other) and len(held_out) == 6
    assert not one & other and len(one | other) == 40
