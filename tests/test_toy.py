"""The toy: a world, its teacher and judge as an endpoint, and what is held out of it."""
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import eval as eval_py
import generate_data
import train
from extras import academic, llava_bench, scienceqa_gpt4
from parts import scienceqa
from parts.files import read_lines, write_lines
from parts.records import normal_record
from toy import report, science, teacher, vqa, world


@pytest.fixture(scope="module")
def toy_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    world.main(["world", "--out", str(out), "--pictures", "60"])
    return out


@pytest.fixture(scope="module")
def url(toy_world):
    """The teacher as a process of its own; its address."""
    command = [sys.executable, "-m", "toy.teacher", "--world", str(toy_world)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.kill()


def test_no_training_picture_shows_or_names_a_held_out_pair(toy_world):
    """The composition test asks for what no part of the assembled model was trained to see."""
    scenes = world.read_coco(toy_world / "annotations" / "instances_train.json")
    seen = {thing.pair for scene in scenes.values() for thing in scene.things}
    assert not seen & set(world.HELD_OUT) and len(scenes) == 60


def test_an_exam_has_as_many_questions_of_each_kind(toy_world):
    """Balanced kinds: no answer is a safe bet; blind and shuffled ask the same questions."""
    rows = read_lines(toy_world / "questions_held_out.jsonl")
    kinds = [row["category"] for row in rows]
    assert {kinds.count(kind) for kind in kinds} == {120}
    blind = read_lines(toy_world / "questions_blind.jsonl")
    shuffled = read_lines(toy_world / "questions_shuffled.jsonl")
    assert [row["text"] for row in blind] == [row["text"] for row in rows]
    assert not any("image" in row for row in blind)
    assert all(a["image"] != b["image"] for a, b in zip(rows, shuffled, strict=True))


def test_a_world_is_a_function_of_its_seed(toy_world, tmp_path):
    """Anybody's toy is the same toy."""
    world.main(["world", "--out", str(tmp_path), "--pictures", "60"])
    for name in ("pairs.jsonl", "annotations/captions_train.json", "images/000000000007.png"):
        assert (tmp_path / name).read_bytes() == (toy_world / name).read_bytes(), name


@pytest.mark.slow
def test_the_world_of_REACT_is_dark_where_CLIP_has_not_been(tmp_path):
    """Diss. Ch. 2 in miniature: a corpus near the classes, and pictures that CLIP knows less of."""
    world.main(["react", "--out", str(tmp_path)])
    assert len((tmp_path / "classes.txt").read_text().splitlines()) == len(world.TARGETS)

    def rows_of(name, count):
        rows = [line.split("\t") for line in (tmp_path / name).read_text().splitlines()]
        assert len(rows) == count and all(text for _, text in rows)
        return rows

    greys = {}
    for name, count in (("corpus", 6000), ("test", 1400), ("captions", 300)):
        files = [tmp_path / "images" / picture for picture, _ in rows_of(f"{name}.tsv", count)]
        greys[name] = sum(Image.open(file).getpixel((0, 0))[0] < 130 for file in files) / count
    for row in json.loads((tmp_path / "datasets.json").read_text()):
        classes = set((tmp_path / row["classes"]).read_text().splitlines())
        for part, count in (("train", 700), ("test", 1400)):
            assert {label for _, label in rows_of(row[part], count)} == classes
    assert greys["test"] == 1 and greys["captions"] == 0 and 0.6 < greys["corpus"] < 0.73


def test_a_mask_is_where_its_thing_is():
    """Squares fill their boxes, other things lie within; the paper is 255."""
    rng = random.Random(1)
    for _ in range(20):
        scene = world.sample_scene(rng, world.TARGETS)
        mask = np.array(world.mask_of(scene))
        for thing in scene.things:
            x, y, width, height = thing.box
            inside = mask[y:y + height, x:x + width].copy()
            shown = inside == world.TARGETS.index(thing.pair)
            assert shown.all() if thing.shape == "square" else 0.2 < shown.mean() < 0.9
            assert (shown | (inside == 255)).all()
            mask[y:y + height, x:x + width] = 255
        assert (mask == 255).all()


def test_what_the_teacher_says_is_true_by_its_own_judge():
    """A right answer gets 10, a wrong one less: the judge knows all that can rightly be said."""
    rng = random.Random(0)
    for _ in range(10):
        scene = world.sample_scene(rng)
        for question, answer in teacher.teach("complex_reasoning", scene, rng):
            words = teacher.review(question, {"A 1": answer, "A 2": "The moon is blue."}, scene)
            good, bad = map(float, words.split("\n")[0].split())
            assert good == 10 and bad == 1, words


def test_data_bench_and_judge_go_through_the_real_endpoint(toy_world, url, tmp_path, capsys):
    """The toy's run uses the client that everybody's run uses."""
    notes = toy_world / "annotations"
    generate_data.main(["instruct", "--captions", str(notes / "captions_train.json"),
                        "--instances", str(notes / "instances_train.json"), "--base_url", url,
                        "--keep_duplicates", "--out", str(tmp_path / "instruct")])
    records = json.loads((tmp_path / "instruct" / "instruct.json").read_text())
    assert len(list(map(normal_record, records))) == 60

    bench = tmp_path / "bench"
    llava_bench.main(["make", "--bench", "4", "--captions", str(notes / "captions_held_out.json"),
                      "--instances", str(notes / "instances_held_out.json"), "--base_url", url,
                      "--out", str(bench)])
    reference = read_lines(bench / "reference.jsonl")
    write_lines(tmp_path / "a.jsonl", [row | {"text": "It is a cow."} for row in reference[:-1]]
                + reference[-1:])
    eval_py.main(["judge", "--questions", str(bench / "questions.jsonl"),
                  "--reference", str(bench / "reference.jsonl"), "--base_url", url,
                  "--answers", str(tmp_path / "a.jsonl"), "--reviews", str(tmp_path / "r.jsonl"),
                  "--context", str(bench / "context.jsonl")])
    scores = [row["tuple"] for row in read_lines(tmp_path / "r.jsonl")]
    assert scores[-1] == [10, 10] and scores[:-1] == [[10, 1]] * 11
    assert "no language model" in capsys.readouterr().out


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A small toy ScienceQA."""
    out = tmp_path_factory.mktemp("toy") / "science"
    science.main(["--out", str(out), "--train", "300", "--test", "200"])
    return out


def test_ScienceQA_has_all_columns_and_its_text_proves_what_it_should(school):
    """Sec. 5.2: a hint alone or no context can be answered by reading, a picture alone cannot."""
    columns = set()
    for split in ("train", "test"):
        for pid, problem in scienceqa.read_problems(school, split).items():
            columns.update(scienceqa.columns_of(problem))
            right = problem["choices"][problem["answer"]]
            proven = science.proven_choice(
                *science.read_question(scienceqa.science_turn(problem, "QCM-LEA")[0]))
            if not problem["image"]:
                assert proven == right, problem
                continue
            assert proven in (None, right) and (problem["hint"] or not proven), problem
            assert (school / "images" / split / pid / problem["image"]).is_file()
    assert columns == set(scienceqa.COLUMNS)


def test_the_expert_reads_cannot_see_and_then_trusts_who_can(school, url, tmp_path):
    """Table 7's last rows through the real endpoint: beside right answers, the judge is right."""
    problems = scienceqa.read_problems(school, "test")
    right = {pid: scienceqa.science_turn(problem, "QCM-LEA")[1]
             for pid, problem in problems.items()}
    ours = tmp_path / "ours.jsonl"
    write_lines(ours, [{"question_id": pid, "text": text} for pid, text in right.items()])
    flags = ["--labels", str(school), "--base_url", url]
    expert = str(tmp_path / "expert.jsonl")
    verdicts = str(tmp_path / "verdicts.jsonl")
    scienceqa_gpt4.main(["answer", *flags, "--out", expert])
    scienceqa_gpt4.main(["judge", *flags, "--answers", str(ours), "--second", expert,
                         "--out", verdicts])
    eval_py.main(["score", "scienceqa", "--labels", str(school), "--answers", str(ours),
                  "--second", expert, "--requery", verdicts, "--json", str(tmp_path / "s.json")])
    scores = json.loads((tmp_path / "s.json").read_text())
    alone = {column: scores[f"second.{column}"] for column in scienceqa.COLUMNS}
    assert alone["NO"] > 85 > alone["TXT"] > 60 > alone["IMG"], alone
    assert scores["judge.AVG"] == 100 > scores["complement.AVG"] > scores["second.AVG"]


# -------------------------------------------------------------------------------------------------
# Short answers, and the scripts whose rows are run over seeds


def test_every_full_answer_has_a_short_one_that_is_its_own():
    """Diss. Sec. 4.3: a word or phrase says what the sentence says."""
    rng = random.Random(0)
    for _ in range(50):
        for question in world.questions_about(world.sample_scene(rng), rng):
            if question.kind in world.KINDS:
                short = vqa.short_answer(question.answer)
                assert short.lower().startswith(question.value.lower()), question
                assert vqa.short_answer(short) == short
                assert vqa.is_short(short) and not vqa.is_short(question.answer)
    assert vqa.short_answer("...") == ""


def test_VQA_in_miniature_goes_through_the_real_converter(toy_world, tmp_path):
    """Diss. Table 4.2, row 2: the prompt ends the first question of each picture, or is absent."""
    vqa.main(["--world", str(toy_world), "--out", str(tmp_path), "--pictures", "20"])
    for source in vqa.SOURCES:
        files = ["--questions", str(tmp_path / f"{source}.jsonl")]
        academic.main(["convert", *files, "--out", str(tmp_path / "with.json")])
        academic.main(["convert", *files, "--out", str(tmp_path / "without.json"),
                       "--format_prompt", "none"])
        asked, plain = (json.loads((tmp_path / name).read_text())
                        for name in ("with.json", "without.json"))
        assert len(asked) == len(plain) > 5
        prompt = "\n" + academic.FORMAT_PROMPTS["short"]
        for one, other in zip(asked, plain, strict=True):
            first = one["conversations"][0]
            assert first["value"].endswith(prompt)
            first["value"] = first["value"].removesuffix(prompt)
            assert one == other and vqa.is_short(one["conversations"][1]["value"])
    exam = {way: read_lines(tmp_path / f"exam_{way}.jsonl") for way in vqa.WAYS}
    assert {len(rows) for rows in exam.values()} == {360}
    assert exam["ambiguous"][0]["text"] == f"Q: {exam['normal'][0]['text']} A:"


def test_an_answer_counts_in_the_form_that_was_asked_for(tmp_path):
    """Diss. Table 4.1b: what is right in another form is not as asked."""
    forms = {"normal": "The circle is red.", "format": "red"}
    rows = [{"question_id": kind, "text": "?", "category": kind, "truth": forms["normal"]}
            for kind in world.KINDS]
    for way in forms:
        write_lines(tmp_path / "vqa" / f"exam_{way}.jsonl", rows)
        for form, text in forms.items():
            answers = [row | {"text": text, "prompt": "?"} for row in rows]
            write_lines(tmp_path / f"exam_{way}-{form}.jsonl", answers)
            scores = report.exam_scores(form, way, [tmp_path])
            assert scores["any form"] == 100
            assert scores["as asked"] == scores["relations"] == 100 * (form == way)
            assert scores["a word"] == 100 * (form == "format")


FAKE = """#!/bin/sh
case "$*" in
    *toy.teacher*) echo http://127.0.0.1:1; exec sleep 60 ;;
    *toy.world*) mkdir -p "$5" ;;
    -c*) echo 1 ;;
    *) echo "$*" >> "$OUT/asked" ;;
esac
"""


def asked(script, tmp_path, **settings):
    """What a script of the toy asks of python, its commands as words; nothing of it is run."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(FAKE)
    python.chmod(0o755)
    shutil.copy(f"{ROOT}/requirements.txt", tmp_path / "installed.txt")
    out = tmp_path / "out"               # of all scripts: what one makes, the next finds
    subprocess.run(["bash", f"{ROOT}/runs/{script}", str(out), "0"], check=True,
                   env=os.environ | {"VENV": str(tmp_path), "OUT": str(out)} | settings)
    lines = (out / "asked").read_text().splitlines()
    (out / "asked").unlink()
    return [shlex.split(line.replace(f"{out}/seed0/", "")) for line in lines]


def test_the_rows_of_the_toy_change_one_thing_each(tmp_path):
    """Tables 4, 8 and Diss. 4.2 in miniature: every command parses, and nothing is made twice."""
    commands = asked("toy_ablations.sh", tmp_path)
    trained = {}
    for command in commands:
        if command[0] == "train.py":
            config = train.resolve(command[1:])[0]
            trained[config.out] = config
    assert trained["full"].init == "stage1" and trained["scratch"].init == "none"
    assert trained["last_layer"].feature_layer == trained["last_layer_stage1"].feature_layer == -1
    assert trained["small_stage1"].llm.endswith("small_llm")
    made = {word for command in commands for word in command if word.endswith(".jsonl")}
    assert made >= {f"reviews_{row}.jsonl" for row in report.TABLE_4}
    assert made >= {f"held_out_{row}.jsonl" for row in report.TABLE_8}

    road = asked("toy_road.sh", tmp_path)
    rows = {}
    for command in road:
        if command[0] == "train.py":
            config = train.resolve(command[1:])[0]
            assert config.out not in trained, "what toy_ablations.sh has made is made once"
            rows[config.out] = config
    names = list(report.TABLE_4_2)
    sources = [[Path(file).stem for file in rows[name].data[1:]] for name in names]
    assert sources == [[], ["plain"], ["attributes"], ["attributes"], ["attributes", "places"],
                       ["attributes", "places", "relations"]]
    assert {rows[name].data[0] for name in names} == {"data_full/instruct.json=0.1"}
    assert [rows[name].projector for name in names] == ["linear"] * 3 + ["mlp2x_gelu"] * 3
    made = {word for command in road for word in command}
    assert made >= {f"exam_{way}-{name}.jsonl" for way in ("normal", "format") for name in names}


def test_a_row_of_the_toy_runs_alone(tmp_path):
    """Table 4's "no instruction tuning" needs stage 1 and the bench, and no stage 2; a row that
    there is not stops the script."""
    commands = asked("toy_ablations.sh", tmp_path, ROWS="stage1")
    trained = [command[command.index("--out") + 1] for command in commands
               if command[0] == "train.py"]
    assert trained == ["stage1"]
    with pytest.raises(subprocess.CalledProcessError):
        asked("toy_ablations.sh", tmp_path, ROWS="stage2")
