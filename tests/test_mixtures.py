"""Mixtures (records.py, data.py, train.py): sources with amounts, what each brings, and pictures under another extension."""
import json
import re
import signal
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import data as data_module
import train
from conftest import start_script, tiny_llava
from data import TEMPLATES, Conversations, inspect
from images import load_image, view_of
from model import IGNORE
from records import Records, image_path, pictures_in


def chat(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def write(tmp_path):
    """write(name, n) -> the path of n samples of text alone; their ids are name_0, name_1, ..."""
    def file(name, n, folder=""):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / name
        records = [{"id": f"{name}_{i}", "conversations": chat(f"What is {i}?", f"It is {i}.")} for i in range(n)]
        path.write_text(json.dumps(records))
        return path
    return file


def ids(sources, *how):
    records = Records([str(s) for s in sources], *how)
    return [records[i]["id"] for i in range(len(records))]


# ---------------------------------------------------------------------------------------------------------------------
# How much of a source


@pytest.mark.parametrize("amount, n", [("", 40), ("=1.0", 40), ("=0.5", 20), ("=.1", 4), ("=0.33", 13), ("=7", 7), ("=1", 1),
                                       ("=40", 40), ("=2.0", 80), ("=2.5", 100), ("=100", 100)])
def test_an_amount_is_a_share_with_a_dot_or_a_count(amount, n, write):
    """LLaVA-1.5 takes 80K of OCR-VQA, say; of a small source all samples some times over, and the rest once more."""
    drawn = ids([f"{write('a.json', 40)}{amount}"])
    times = {i: drawn.count(f"a.json_{i}") for i in range(40)}
    assert len(drawn) == n and {n // 40, -(-n // 40)} >= set(times.values()), f"some samples come oftener than others: {times}"


def test_what_is_drawn_of_a_source_depends_on_it_and_the_seed_alone(write):
    """Ours: whoever adds a source, or moves the files, trains on the same samples of the others; less is part of more."""
    a, b, moved = write("a.json", 50), write("b.json", 60), write("a.json", 50, "elsewhere")
    alone = ids([f"{a}=0.4"], 1.0, 7)
    assert alone == ids([f"{a}=20"], 1.0, 7) == ids([f"{moved}=0.4"], 1.0, 7) == ids([a], 0.4, 7) == ids([f"{a}=0.8"], 0.5, 7)
    both = ids([f"{b}=0.5", f"{a}=0.4"], 1.0, 7)
    assert both[30:] == alone and len(both) == 50, "another source changed the draw of this one"
    assert set(alone) <= set(ids([f"{a}=0.6"], 1.0, 7)), "a larger share is not the smaller one and more"
    assert alone != ids([f"{a}=0.4"], 1.0, 8), "the seed does nothing"
    places = [{int(i.split("_")[1]) for i in ids([f"{path}=25"], 1.0, 7)} for path in (a, write("c.json", 50))]
    assert places[0] != places[1], "two files of the same length lose the same lines"
    assert [i.split("_")[0] for i in both] == ["b.json"] * 30 + ["a.json"] * 20 and both == sorted(
        both, key=lambda i: (i[0] == "a", int(i.split("_")[1]))), "a file's order is lost"


def test_fraction_keeps_that_share_of_every_source(write):
    """Diss. Sec. 4.5: half of the data, of each of its sources."""
    sources = [write("a.json", 40), f"{write('b.json', 100)}=0.2", f"{write('c.json', 10)}=30"]
    drawn = ids(sources, 0.5, 3)
    assert {s: sum(i.startswith(s) for i in drawn) for s in "abc"} == {"a": 20, "b": 10, "c": 15}


def test_a_drawn_sample_is_named_by_its_place_in_the_file(write):
    """Ours: file[index] in a message is where one finds the sample, whatever was drawn."""
    records = Records([f"{write('a.json', 30)}=11", f"{write('b.json', 9)}=20"])
    for i in range(len(records)):
        name, index = re.fullmatch(r"(\w\.json)\[(\d+)\] \(id .*\)", records.where(i)).groups()
        assert records[i]["id"] == f"{name}_{index}" and records.source(i)[1] == int(index)
    assert len(records) == 31 and records.counts == [11, 20] and records.totals == [30, 9]


def test_only_what_is_drawn_is_kept_and_repeats_cost_nothing(write):
    """Ours: a mixture's memory is that of the different samples in it."""
    a = write("a.json", 40)
    whole, part, twice = (Records([f"{a}{amount}"]) for amount in ("", "=10", "=80"))
    assert len(part.blob) < 0.3 * len(whole.blob) and twice.blob == whole.blob and len(twice) == 80


@pytest.mark.parametrize("source, error", [
    ("a.json=0", "share .*or a count"), ("a.json=0.0", "share"), ("a.json=half", "no such file; .*share"),
    ("a.json=-3", "share"), ("a.json=1e3", "share"), ("a.json=", "share"), ("gone.json=0.5", "gone.json: no such file"),
    ("a.json=0.001", "nothing would be left of its 40 samples")])
def test_a_wrong_amount_is_an_error(source, error, write, tmp_path):
    """Ours: what was typed, and what may be."""
    write("a.json", 40)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        Records([str(tmp_path / source)])


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_a_wrong_fraction_is_an_error(fraction, write):
    """Ours: more than all of the data is asked for with amounts, not by accident."""
    with pytest.raises(ValueError, match="--fraction .* above 0 and up to 1"):
        Records([write("a.json", 40)], fraction)


def test_a_file_whose_name_holds_an_equals_sign_is_that_file(write):
    """Ours: what exists under the name as typed is meant."""
    path = write("lr=0.5", 8)
    assert len(ids([path])) == 8 and len(ids([f"{path}=0.5"])) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Pictures under another extension


@pytest.fixture
def images(tmp_path):
    """images/: one.png, sub/two.JPG, both.png and both.webp, notes.txt, exact.jpg and exact.png."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("one.png", "sub/two.JPG", "both.png", "both.webp", "exact.jpg", "exact.png")):
        Image.new("RGB", (20 + i, 30), (40 * i, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return str(folder)


def test_a_picture_is_found_under_another_extension(images):
    """LLaVA-1.5's OCR-VQA: all names end in .jpg, the pictures do not; .JPG is another extension, too."""
    for name, found in (("one.jpg", "one.png"), ("one.JPEG", "one.png"), ("one", "one.png"), ("sub/two.jpg", "sub/two.JPG"),
                        ("exact.jpg", "exact.jpg"), ("one.png", "one.png")):
        assert image_path(images, name) == f"{images}/{found}"
    assert load_image(image_path(images, "one.jpg")).size == (20, 30)
    for name in ("two.jpg", "one.v2", "one.txt", "notes.jpg", "On.jpg", "sub/one.jpg", "gone/one.jpg"):
        assert image_path(images, name) == f"{images}/{name}", f"{name} was taken for something else"


def test_two_pictures_that_could_be_meant_are_an_error(images):
    """Ours: a guess would be the wrong picture in half of the cases."""
    with pytest.raises(ValueError, match=r"image 'both.jpg' is not in .*, but both.png and both.webp are"):
        image_path(images, "both.jpg")


def test_a_folder_is_listed_once_and_anew_when_it_changes(images):
    """Ours: 100,000 names in a folder of 100,000 pictures must not be 100,000 listings."""
    pictures_in.cache_clear()
    for _ in range(100):
        assert image_path(images, "one.jpg").endswith("one.png")
        image_path(images, "gone.jpg")
    assert pictures_in.cache_info().misses == 1, "the folder was listed more than once"
    time.sleep(0.02)                                                       # file systems keep time in ticks
    Image.new("RGB", (9, 9)).save(f"{images}/gone.gif")
    assert image_path(images, "gone.jpg").endswith("gone.gif"), "a picture that came later is not seen"


# ---------------------------------------------------------------------------------------------------------------------
# What each source brings


@pytest.fixture
def mixture(images, tmp_path, write):
    """vqa.json: 12 samples, of which one picture is missing and 5 have another extension; text.json: 30 of text alone."""
    names = ["exact.jpg"] * 6 + ["one.jpg"] * 3 + ["sub/two.jpg"] * 2 + ["gone.jpg"]
    (tmp_path / "vqa.json").write_text(json.dumps([
        {"id": f"vqa_{i}", "image": name, "conversations": chat(f"<image>\nWhat is {i}?", "A thing.", "Why?", "So.")}
        for i, name in enumerate(names)]))
    return [str(tmp_path / "vqa.json"), str(write("text.json", 30))]


VQA = r"vqa.json: 12 samples, 1 bad, 1 images missing, 0 text only; 5 found under another extension, e.g. one.jpg as one.png"


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_and_renamed_pictures_are_counted_for_each_source(workers, mixture, images, capsys):
    """LLaVA-1.5's data come from six places; a folder that was not unpacked is seen in its source's line."""
    flags = ["--images", images, "--workers", str(workers)]
    assert data_module.main(["stats", *mixture, *flags]) == 1
    shown = capsys.readouterr().out
    assert VQA in shown and "text.json: 30 samples, 0 bad, 0 images missing, 30 text only\n  answers per sample" in shown
    assert "vqa.json[11] (id vqa_11): image 'gone.jpg' is not in " in shown
    assert data_module.main(["check", *mixture, *flags]) == 1
    shown = capsys.readouterr().out
    assert VQA in shown and "text.json: 30 samples" in shown and shown.endswith("42 samples, 1 bad\n")
    data_module.main(["check", mixture[0] + "=6", mixture[1], *flags, "--fraction", "0.5", "--seed", "3"])
    shown = capsys.readouterr().out
    assert "vqa.json: 3 samples drawn from 12, " in shown and "text.json: 15 samples drawn from 30, 0 bad" in shown


def test_two_candidates_are_a_bad_sample_and_no_missing_one(images, tmp_path):
    """Ours: the check before step 0 names both pictures."""
    (tmp_path / "x.json").write_text(json.dumps([{"image": "both.jpg", "conversations": chat("<image>", "A.")}]))
    problems, table = inspect(Conversations(Records([tmp_path / "x.json"]), images, None, None, view_of("crop", 224, 14)))
    assert "both.png and both.webp" in problems[0] and table[0, 5:].tolist() == [0, 0]


def test_a_picture_with_another_extension_is_what_the_model_sees(images, mixture):
    """Ours: found in the check, found in training: the same pixels as under its own name."""
    model = tiny_llava()
    data = Conversations(Records(mixture[:1]), images, model.tokenizer, TEMPLATES["llava_v0"], view_of("crop", 28, 14))
    want = view_of("crop", 28, 14).X_v([load_image(f"{images}/one.png")])
    assert data[0, 6, True]["X_v"].equal(want)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture
def command(parts, images, mixture, tmp_path):
    """command(out, ...): a command line that trains on 24 of the pictures' samples, which are 12, and half of the text."""
    def flags(out, *more):
        sources = ["--data", mixture[0] + "=24", mixture[1] + "=0.5", "--images", images]
        rest = ["--vision", parts / "clip", "--llm", parts / "llm", "--template", "llava_v0", "--stage", 1, "--lr", "2e-2"]
        return [str(x) for x in [*sources, *rest, "--global_batch_size", 4, "--workers", 0, "--skip_bad", "--out", out, *more]]
    return flags


def test_pictures_and_text_alone_train_together_and_the_banner_says_what_each_source_brings(command, tmp_path, capsys):
    """Diss. Sec. 4.3: language-only conversations are mixed in; batches of them alone give W no gradient, and no error."""
    assert train.main(command(tmp_path / "out", "--global_batch_size", 2)) == 0
    shown = capsys.readouterr().out
    assert "data: 39 samples, 2 bad and left out, 0 held out\n" in shown
    sources = (r"\n      .*vqa.json: 24 samples drawn from 12, 2 bad, 2 images missing, 0 text only; 10 found under another "
               r"extension, e.g. one.jpg as one.png"
               r"\n      .*text.json: 15 samples drawn from 30, 0 bad, 0 images missing, 15 text only\n +22 images; ")
    assert re.search(sources, shown), shown
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 19 and sum(r["images"] for r in log) == 22
    assert any(r["images"] == 0 for r in log), "no batch was of text alone: the test tests nothing"
    assert all(0 < r["loss"] < float("inf") for r in log)


def test_without_skip_bad_the_sources_stand_above_the_bad_samples(command, tmp_path):
    """Ours: with thousands of missing pictures, the twenty that are listed do not say which folder is missing."""
    argv = [flag for flag in command(tmp_path / "out") if flag != "--skip_bad"]
    with pytest.raises(ValueError, match=r"2 of 39 samples are bad.*:\n.*vqa.json: 24 .* 2 images missing.*\n"
                                         r".*text.json: 15 .*\nvqa.json\[11\] \(id vqa_11\): image 'gone.jpg' is not in "):
        train.main(argv)


@pytest.mark.slow
def test_a_mixture_is_resumed_bit_for_bit_and_never_another_one(command, mixture, tmp_path):
    """Ours: amounts, fraction and seed are the run's; after a kill the same samples are drawn, or the run is refused."""
    flags = ["--fraction", 0.75, "--epochs", 2]
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert train.main(command(straight, *flags)) == 0
    process = start_script(tmp_path, "train.py", *command(out, *flags, "--save_every", 3))
    while process.is_alive() and not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes().count(b"\n") >= 5):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()[-3000:]
    for other, error in ((["--fraction", 0.5], "other flags: --fraction 0.5"), (["--seed", 7], "other flags: --seed 7"),
                         (["--data", mixture[0] + "=24", mixture[1] + "=16"], "other flags: --data")):
        with pytest.raises(ValueError, match=error):
            train.main(command(out, *flags, *other, "--resume"))
    assert train.main(command(out, *flags, "--resume")) == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (straight, out))
    assert all(np.array_equal(one[name], two[name]) for name in one), "the resumed run ended elsewhere"


def build(argv):
    """What `main` builds before its loop: the model, the data, and the indices to train on and held out."""
    config, _ = train.resolve(argv)
    machine = train.start(config)
    model, _, template = train.build_model(config, machine)
    data, _, train_on, held_out, _ = train.build_data(config, machine, model, template)
    return model, data, train_on, held_out


def test_training_draws_with_its_own_seed_and_fraction(command, mixture, tmp_path):
    """Ours: what `data.py --seed --fraction` shows is what train.py trains on; the checkpoint says how much that was."""
    model, data, _, _ = build(command(tmp_path / "out", "--seed", 3, "--fraction", 0.25))
    drawn = [data.records[i]["id"] for i in range(len(data))]
    assert drawn == ids([mixture[0] + "=24", mixture[1] + "=0.5"], 0.25, 3) != ids(mixture, 0.25, 42)
    assert model.meta["fraction"] == 0.25 and model.meta["data"][0].endswith("vqa.json=24")


def test_what_is_held_out_is_not_trained_on_as_a_copy(command, tmp_path):
    """Ours: of a source that is repeated, the validation loss would be that of samples which were trained on."""
    _, data, train_on, held_out = build(command(tmp_path / "out", "--val_samples", 6))
    one, other = ({data.records[int(i)]["id"] for i in part} for part in (train_on, held_out))
    assert len(held_out) == 6 and any(name.startswith("vqa") for name in other), "the test tests nothing"
    assert not one & other, f"{one & other} are held out and trained on"
    assert len(one | other) == 26, "more was left out than the copies of what is held out"


def test_the_images_place_is_drawn_for_each_copy(command, tmp_path):
    """Eq. (2): a repeated sample is a sample of its own; its copies need not have the image in the same place."""
    model, data, train_on, _ = build(command(tmp_path / "out"))
    places = {}
    for i in train_on:
        sample = data[0, int(i), True]
        if len(sample["X_v"]):
            places.setdefault(data.records[int(i)]["id"], set()).add(sample["input_ids"].index(model.image_id))
        assert any(label != IGNORE for label in sample["labels"])
    assert any(len(place) == 2 for place in places.values()), "all copies are alike"
