"""The miniature world: what it draws, writes and asks is true, and the held-out pairs are held out."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, CLIPVisionConfig, CLIPVisionModel

import generate_data
import toy
import toy_pretrain
from images import preprocess
from model import LLaVA
from records import whole_lines
from toy import HELD_OUT, KINDS, PAIRS, SEEN, Scene, Thing


def scenes(n=300, seed=0, **more):
    rng = random.Random(seed)
    return [toy.sample_scene(rng, **more) for _ in range(n)], rng


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """As runs/toy.sh makes it: pictures and COCO's files, then both stages' data from them."""
    folder = tmp_path_factory.mktemp("world")
    toy.main(["world", "--out", str(folder), "--seed", "3", "--pictures", "60", "--questions", "120"])
    generate_data.main(["expand", "--pairs", str(folder / "pairs.jsonl"), "--out", str(folder / "stage1.json")])
    generate_data.main(["instruct", "--captions", str(folder / "annotations" / "captions_train.json"), "--teacher", "script",
                        "--instances", str(folder / "annotations" / "instances_train.json"), "--out", str(folder)])
    return folder


def test_every_colour_and_every_shape_is_seen_though_pairs_are_held_out():
    """The composition test is about pairs: a colour or a shape that no picture has could not be learnt at all."""
    assert {c for c, _ in SEEN} == set(toy.COLOURS) and {s for _, s in SEEN} == set(toy.SHAPES)
    assert len(HELD_OUT) == len(set(HELD_OUT)) == 8 and not set(HELD_OUT) & set(SEEN)


def test_the_coco_box_is_the_box_of_the_drawn_pixels():
    """A COCO bbox is [x, y, width, height] in pixels; the teacher knows nothing but boxes, so they must be right."""
    for scene in scenes()[0]:
        pixels = np.asarray(toy.draw(scene)).astype(int)
        for t in scene.things:
            r, c = (toy.CELL * v for v in t.cell)
            ys, xs = np.where(abs(pixels[r:r + toy.CELL, c:c + toy.CELL] - scene.grey).sum(-1) > 6)
            found = (c + xs.min(), r + ys.min(), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1)
            assert found == t.box, f"{t}: the pixels say {found}"


def test_a_larger_picture_has_the_same_things_as_details():
    """What higher resolution is for: at 128 pixels each thing fills one 16-pixel patch of a tile, a quarter of it when the
    picture is shrunk to 64; places are the same four rows and columns; normalised boxes give the scene back."""
    for scene in scenes(200, side=128)[0]:
        assert toy.draw(scene).size == (128, 128) and len({t.cell for t in scene.things}) == len(scene.things)
        for t in scene.things:
            assert t.box[2] in (9, 10, 13, 14) and t.cell == (t.box[1] // 32, t.box[0] // 32)
            assert all(t.box[k] // 16 == (t.box[k] + t.box[k + 2] - 1) // 16 for k in (0, 1)), "a thing lies across patches"
        boxes = [(t, [round(v / 128, 3) for v in (t.box[0], t.box[1], t.box[0] + t.box[2], t.box[1] + t.box[3])])
                 for t in scene.things]
        assert toy.scene_of("\n".join(f"{t.name}: {box}" for t, box in boxes)).things == scene.things


@pytest.mark.slow
def test_larger_pictures_come_with_as_many_near_ones_for_stage_1(tmp_path):
    """What tiles will show, W has to know from squares: half of the pairs show things near; none a held-out pair."""
    toy.main(["world", "--out", str(tmp_path), "--seed", "1", "--pictures", "20", "--questions", "120", "--side", "128"])
    pairs = whole_lines(tmp_path / "pairs.jsonl")
    sizes = [Image.open(tmp_path / "images" / pair["image"]).size[0] for pair in pairs]
    assert sizes == [128] * 20 + [64] * 20 and len({pair["image"] for pair in pairs}) == 40
    assert not any(f"{colour} {shape}" in pair["caption"] for pair in pairs for colour, shape in HELD_OUT)


def test_answers_agree_with_the_boxes():
    """A scene small enough to be read by eye; every answer below was written by hand."""
    scene = Scene((Thing("red", "circle", (2, 2, 9, 9)), Thing("blue", "star", (34, 3, 13, 13)),
                   Thing("red", "ring", (3, 50, 9, 9))))
    said = {q.text: q.answer for seed in range(20) for q in toy.questions(scene, random.Random(seed))}
    for question, answer in {
            "What colour is the star?": "The star is blue.",
            "What shape is the blue thing?": "The blue thing is a star.",
            "How many red things are there?": "The number of red things is two.",
            "How many cross shapes are there?": "The number of cross shapes is zero.",
            "How many things can you see?": "The number of things is three.",
            "Is there a blue star?": "Yes, there is.",
            "Is there a blue circle?": "No, there is not.",
            "Where is the red ring?": "The red ring is in A 4.",
            "Is the blue star left or right of the red circle?":
                "The blue star is in column C and the red circle is in column A, so it is right.",
            "Is the red circle above or below the red ring?":
                "The red circle is in row 1 and the red ring is in row 4, so it is above."}.items():
        assert said[question] == answer
    assert "What shape is the red thing?" not in said, "two red things: the question is ambiguous"
    assert "Is the blue star above or below the red circle?" not in said, "neither"
    listed = {q.text: set(q.answer.rstrip(".").split(", ")) for q in toy.questions(scene, random.Random(0))}
    assert listed["In short, what row is what?"] == {"red circle 1", "blue star 1", "red ring 4"}
    assert listed["In short, what colour is what?"] == {"circle red", "star blue", "ring red"}
    assert listed["In short, what column is what?"] == {"red circle A", "blue star C", "red ring A"}


def test_a_coco_file_gives_back_the_scenes_that_it_was_written_from(small_world):
    """`read_coco` is all that the scripted teacher may know of a picture (Sec. 3: captions and boxes)."""
    rng = random.Random(3)
    drawn = [toy.sample_scene(rng) for _ in range(60)]
    read = toy.read_coco(small_world / "annotations" / "instances_train.json")
    assert [read[i + 1].things for i in range(60)] == [scene.things for scene in drawn]
    captions = json.loads((small_world / "annotations" / "captions_train.json").read_text())["annotations"]
    assert len(captions) == 5 * 60, "COCO has five captions a picture"


def test_training_never_shows_or_names_a_held_out_pair(small_world):
    """Else `new_pairs` would not measure composition."""
    read = toy.read_coco(small_world / "annotations" / "instances_train.json")
    assert not {t.pair for scene in read.values() for t in scene.things} & set(HELD_OUT)
    text = (small_world / "stage1.json").read_text() + (small_world / "instruct.json").read_text()
    assert not [pair for pair in HELD_OUT if " ".join(pair) in text]


def test_clip_never_sees_a_held_out_pair():
    """Not in a named colour, and not in a paint whose nearest colour is held out with that shape."""
    rng = random.Random(0)
    for _ in range(200):
        for scene, _ in toy_pretrain.siblings(rng):
            for t in scene.things:
                rgb = t.paint or toy.COLOURS[t.colour]
                nearest = min(toy.COLOURS, key=lambda c: sum(abs(p - q) for p, q in zip(rgb, toy.COLOURS[c])))
                assert (nearest, t.shape) in SEEN


def test_a_shrunk_clip_computes_the_same_on_a_smaller_scale():
    """Layer norms undo a scale: Z_v shrinks, what CLIP says of a picture does not change."""
    torch.manual_seed(0)
    vision = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2,
                                              image_size=64, patch_size=16, initializer_factor=2.5)).eval()
    X_v = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = vision(X_v, output_hidden_states=True)
        toy_pretrain.shrink(vision, 0.5)
        after = vision(X_v, output_hidden_states=True)
    for big, small in zip(before.hidden_states, after.hidden_states):
        torch.testing.assert_close(small, 0.5 * big, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.pooler_output, before.pooler_output, rtol=1e-2, atol=1e-3)


def test_the_llava_json_alternates_and_has_one_image_in_the_first_turn(small_world):
    """The schema of LLaVA-Instruct; the picture before or after the first question, both drawn (Eq. (2))."""
    firsts = set()
    for file in ("stage1.json", "instruct.json"):
        for sample in json.loads((small_world / file).read_text()):
            turns = sample["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [t["value"].count("<image>") for t in turns] == [1] + [0] * (len(turns) - 1)
            assert (small_world / "images" / sample["image"]).exists()
            firsts.add(turns[0]["value"].startswith("<image>\n"))
    assert firsts == {True, False}


def test_no_answer_is_a_safe_bet(small_world):
    """Each kind has 120 questions with its answers equally often, so a blind model stays at chance."""
    rows = whole_lines(small_world / "questions_held_out.jsonl")
    for kind in KINDS:
        said = [r["truth"] for r in rows if r["category"] == kind]
        assert len(said) == 120
        most = max(said.count(x) for x in said)
        assert most <= {"existence": 60}.get(kind, 30), f"{kind}: one answer is right {most} times of 120"


def test_blind_and_shuffled_ask_the_same_questions(small_world):
    """They differ in the picture alone: absent, or another question's."""
    read = lambda split: whole_lines(small_world / f"questions_{split}.jsonl")
    for held, blind, shuffled in zip(read("held_out"), read("blind"), read("shuffled")):
        assert {k: v for k, v in held.items() if k != "image"} == blind
        assert {**shuffled, "image": held["image"]} == held and shuffled["image"] != held["image"]


def test_every_new_pairs_question_is_decided_by_a_held_out_pair():
    scenes, asked = toy.exam(random.Random(0), 24, new=True)
    assert all(question.about & set(HELD_OUT) for _, question in asked)
    for k, question in asked:
        assert question.answer in {q.answer for q in toy.questions(scenes[k], random.Random(0), PAIRS)}


def test_a_missing_answer_is_an_error_and_not_a_wrong_answer(small_world, tmp_path):
    answers = tmp_path / "answers.jsonl"
    rows = whole_lines(small_world / "questions_blind.jsonl")
    generate_data.write_lines(answers, [{"question_id": r["question_id"], "text": r["truth"] + " "} for r in rows])
    assert toy.score(small_world / "questions_blind.jsonl", answers)[0]["all"] == 100
    generate_data.write_lines(answers, [{"question_id": r["question_id"], "text": r["truth"]} for r in rows[1:]])
    with pytest.raises(ValueError, match="1 of 720 questions"):
        toy.score(small_world / "questions_blind.jsonl", answers)


def write_reviews(path, conv, detail, complex_):
    """Reviews of 30 questions by the scripted judge: the reference has 10 each, the answers what is given for their kind."""
    generate_data.write_lines(path, [
        {"question_id": n, "category": kind, "answer1_id": "r", "answer2_id": "a", "content": f"10 {given}",
         "tuple": [10, given], "judge": toy.JUDGE}
        for n, (kind, given) in enumerate((("conv", conv), ("detail", detail), ("complex", complex_)) * 10)])


def test_report_writes_results_and_a_picture(small_world, tmp_path, capsys):
    """`results.json` in percent by kind, and `report.png`, from answers of which half are right and a judged bench."""
    write_reviews(tmp_path / "reviews.jsonl", 9, 7, 5)
    (tmp_path / "world").symlink_to(small_world)
    for split in toy.SPLITS:
        rows = whole_lines(small_world / f"questions_{split}.jsonl")
        generate_data.write_lines(tmp_path / f"answers_{split}.jsonl", [
            {"question_id": r["question_id"], "text": r["truth"] if n % 2 else "No."} for n, r in enumerate(rows)])
    for stage in (1, 2):
        (tmp_path / f"stage{stage}").mkdir()
        log = [{"step": i, "loss": 2 / (i + 1)} for i in range(9)]
        generate_data.write_lines(tmp_path / f"stage{stage}" / "log.jsonl", log)
    toy.main(["report", "--out", str(tmp_path), "--minutes", "world=0.1", "stage1=0.5"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["held_out"]["all"] == 50 and set(results["blind"]) == {"all", *KINDS}
    assert results["minutes"] == {"world": 0.1, "stage1": 0.5}
    assert results["bench"] == {"conv": 90, "detail": 70, "complex": 50, "all": 70}
    assert "bench      conv  90.0  detail  70.0  complex  50.0  all  70.0" in capsys.readouterr().out
    assert (tmp_path / "report.png").stat().st_size > 10000


@pytest.mark.parametrize("reasoned, turned, concluded", [
    ("The red star is in row 1 and the red ring is in row 4, so it is above.",
     "It is above. The red star is in row 1 and the red ring is in row 4.", "It is above"),
    ("I see a red star and a red ring. So no, they do not.", "No, they do not. I see a red star and a red ring.",
     "No, they do not"),
    ("There are three things. Taking away one leaves two.", "Taking away one leaves two. There are three things.",
     "Taking away one leaves two"),
    ("The star is red.", "The star is red.", "The star is red"), ("Yes, there is.", "Yes, there is.", "Yes, there is")])
def test_answers_can_begin_with_their_conclusion(reasoned, turned, concluded):
    """Table 8, "predict answer first": the same words in the other order, and the same conclusion is read from both."""
    assert toy.answer_first(reasoned) == turned and toy.answer_first(turned) == turned
    assert toy.conclusion(reasoned) == toy.conclusion(turned) == concluded


def test_every_reasoning_answer_of_the_teacher_can_be_turned():
    """Else the ablation would compare two data sets that are mostly the same."""
    some, rng = scenes(200)
    answers = [answer for scene in some for _, answer in toy.reasoning(scene, rng)]
    answers += [q.answer for scene in some for q in toy.questions(scene, rng) if q.kind == "relation"]
    assert len(answers) > 400 and all(toy.answer_first(answer) != answer for answer in answers)


def test_answer_first_data_is_the_same_data(small_world, tmp_path):
    """Only answers change, and only in their order."""
    toy.main(["answer_first", "--data", str(small_world / "instruct.json"), "--out", str(tmp_path / "turned.json")])
    before, after = (json.loads(path.read_text()) for path in (small_world / "instruct.json", tmp_path / "turned.json"))
    for a, b in zip(before, after, strict=True):
        for n, (old, new) in enumerate(zip(a["conversations"], b["conversations"], strict=True)):
            assert new["value"] == (toy.answer_first(old["value"]) if n % 2 else old["value"])
    assert before != after


def test_the_ablations_stand_beside_the_papers_and_say_where_they_disagree(small_world, tmp_path, capsys):
    """Changes from the first row, over seeds: clear or not, with the paper or against it (Tables 4 and 8)."""
    questions = whole_lines(small_world / "questions_held_out.jsonl")
    wrong = {"full": 100, "last_layer": 40, "answer_first": 100, "scratch": 300, "small": 100}      # of 720 answers
    for seed in range(3):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "world").symlink_to(small_world)
        for row in toy.TABLE_4:
            write_reviews(folder / f"reviews_{row}.jsonl", 9, *((7, 5) if row == "full" else (6, 5 + seed - 1)))
        for row, n in wrong.items():
            n += seed * (row == "small") - (row == "small")
            generate_data.write_lines(folder / f"held_out_{row}.jsonl", [
                {"question_id": q["question_id"], "text": "No." if k < n else toy.answer_first(q["truth"]) if
                 row == "answer_first" else q["truth"]} for k, q in enumerate(questions)])
    toy.main(["ablations", "--out", str(tmp_path)])
    tables = capsys.readouterr().out
    four, eight = tables.split("Table 8")
    line = lambda text, column, name: next(x for x in text.split(f"\n{column} ")[1].splitlines() if x.startswith(name))
    assert line(four, "detailed description", "conversation  ").split()[1:] == "60.0 ± 0.0 -10.0 ± 0.0 59.8 -15.5".split()
    assert "no clear change" in line(four, "complex reasoning", "no instruction tuning"), "its three seeds are 40, 50, 60"
    assert line(eight, "all questions", "features of the last").split()[-4:] == "DISAGREES with the paper".split()
    scratch = line(eight, "all questions", "training from scratch")
    assert scratch.endswith("-27.8 ±  0.0    85.81   -5.11  5 times the paper's"), scratch
    assert "no clear change" in line(eight, "all questions", "predict answer first"), "the same answers in the other order"
    with pytest.raises(ValueError, match="at least two folders"):
        toy.main(["ablations", "--out", str(tmp_path / "seed0")])


def test_the_familys_table_has_a_row_for_each_system(small_world, tmp_path, capsys):
    """runs/toy_family.sh ends with it: accuracies by kind of question."""
    (tmp_path / "world").symlink_to(small_world)
    questions = whole_lines(small_world / "questions_held_out.jsonl")
    for system, right in (("toy", "shape"), ("toy-hd", "colour")):
        generate_data.write_lines(tmp_path / f"held_out_{system}.jsonl", [
            {"question_id": q["question_id"], "text": q["truth"] if q["category"] == right else "No."} for q in questions])
    toy.main(["family", "--out", str(tmp_path)])
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("toy ") and "shape 100.0" in one and "colour   0.0" in one
    assert two.startswith("toy-hd ") and "shape   0.0" in two and "colour 100.0" in two


@pytest.mark.slow
def test_the_parts_can_be_rebuilt_and_assembled(tmp_path):
    """What --vision and --llm take: a CLIP that trained on pictures of seen pairs, a language model that never saw one."""
    for part in ("llm", "clip", "small_llm"):
        toy_pretrain.main(["--out", str(tmp_path), "--part", part, "--steps", "2"])
    model = LLaVA.from_parts(str(tmp_path / "clip"), str(tmp_path / "llm"))
    assert model.N == toy.GRID ** 2, "a cell is a patch"
    scene = Scene((Thing("red", "star", (18, 2, 13, 13)),))
    written = [model.tokenizer.decode(note).split() for note in toy_pretrain.notes(scene, model.tokenizer)]
    assert written[:2] == [[".", "1", "A"], ["large", "red", "star", "1", "B"]], "every word of a note is one token"
    text = "Où est le cercle? 円"
    assert model.tokenizer.decode(model.tokenizer.encode(text, add_special_tokens=False)) == text, "a byte-level BPE knows all"


def test_the_shipped_clip_is_pretrained():
    """The newcomer's run starts from it: it tells a picture's own caption from those of 63 others."""
    clip = CLIPModel.from_pretrained("toy_parts/clip").eval()
    tokenizer = AutoTokenizer.from_pretrained("toy_parts/clip")
    some, rng = scenes(64, seed=11)
    texts = [toy.caption(scene, rng, (True, True, "in {0.place}")) for scene in some]
    ids = [[toy_pretrain.BOS, *tokenizer.encode(text, add_special_tokens=False), toy_pretrain.PAD] for text in texts]
    T = max(map(len, ids))
    with torch.no_grad():
        logits = clip(input_ids=torch.tensor([row + [toy_pretrain.PAD] * (T - len(row)) for row in ids]),
                      pixel_values=torch.stack([preprocess(toy.draw(s), toy.SIDE) for s in some])).logits_per_image
    assert (logits.argmax(1) == torch.arange(64)).float().mean() > 0.5, "CLIP does not know its captions"
