"""Where the data comes from (Sec. 3): contexts, prompts, a client that loses nothing, records."""
import json
import re
import shutil
from collections import Counter

import pytest
from conftest import lines

import generate_data
from parts.files import PROMPTS, brief_instructions, read_json, read_lines, write_lines
from parts.records import normal_record
from parts.templates import HOLDS_STOP, TEMPLATES

SHOP = {"id": "7", "image": "7.jpg", "captions": ["A red bus at a shop.", "A bus  stops."],
        "instances": [{"category": "bus", "bbox": [0.1, 0.25, 0.53004, 1]}]}


def write_contexts(path, n):
    """n pictures whose last caption is their name, which the test's server quotes."""
    rows = [{"id": f"p{i}", "image": f"p{i}.jpg", "captions": ["a picture", f"number {i}"]}
            for i in range(n)]
    write_lines(path, rows)
    return path


def reply_of(text, finish="stop"):
    """A reply as a chat endpoint gives it."""
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


def instruct(tmp_path, contexts, *flags):
    argv = ["instruct", "--captions", contexts, "--out", tmp_path / "out", "--model", "m", *flags]
    generate_data.main([str(word) for word in argv])
    return json.loads((tmp_path / "out" / "instruct.json").read_text())


def test_a_context_is_captions_and_normalised_corners():
    """Table 1, top: boxes are `category: [x1, y1, x2, y2]`; a conversation sees captions alone."""
    context = generate_data.from_record(SHOP, Counter())
    assert context.captions == "A red bus at a shop.\nA bus stops."
    assert context.boxes == "bus: [0.1, 0.25, 0.53, 1.0]"
    assert generate_data.context_text("conversation", context) == context.captions
    assert context.boxes in generate_data.context_text("complex_reasoning", context)


def coco_files(folder, caption_rows=(), box_rows=(), image_id=7, mark=""):
    """The two files of one picture, with one caption and one box unless others are given."""
    images = [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}]
    texts = [{"image_id": image_id, "caption": text} for text in SHOP["captions"]]
    boxes = [{"image_id": image_id, "category_id": 6, "bbox": [20, 25, 86.008, 75]}]
    names = [{"id": "6", "name": "bus"}]
    contents = {"c.json": {"images": images, "annotations": [*texts, *caption_rows]},
                "i.json": {"annotations": [*boxes, *box_rows], "categories": names}}
    for name, content in contents.items():
        (folder / name).write_text(mark + json.dumps(content))
    return str(folder / "c.json"), str(folder / "i.json")


@pytest.mark.parametrize("image_id", [7, "0007"])
def test_coco_files_and_json_lines_give_the_same_contexts(tmp_path, capsys, image_id):
    """COCO's own boxes are x, y, width, height in pixels; other tools write ids as text, and marks.

    What says nothing, or is about nothing, is counted, and never asked about.
    """
    captions = [{"image_id": 7, "caption": None}, {"image_id": 7, "caption": " "},
                {"image_id": 8, "caption": "a bus"}]
    boxes = [{"image_id": 7, "category_id": 6, "bbox": [10, 50, 20, 0]},     # COCO has such lines
             {"image_id": 9, "category_id": 6, "bbox": [1, 2, 3, 4]}]
    files = coco_files(tmp_path, captions, boxes, image_id, mark="\ufeff")
    write_lines(tmp_path / "c.jsonl", [SHOP])
    found = generate_data.read_contexts(*files)
    told = capsys.readouterr().out
    assert found == generate_data.read_contexts(str(tmp_path / "c.jsonl"))
    for count in ("2 captions that are empty", "1 captions of no image", "1 boxes without area",
                  "1 boxes of other pictures"):
        assert count in told


@pytest.mark.parametrize("captions, boxes, image_id, says", [
    ([{"image_id": 7, "caption": 5}], [], 7, r"c.json: annotations\[2\]: caption: 5"),
    ([], [], 8, "c.json: none of its captions is of one of its 1 images"),
    ([{"image_id": 7, "caption": "x"}], [], 8, "i.json: none of its boxes"),
    ([], [{"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}], 7, "no category"),
    ([], [{"image_id": 7, "category_id": 6, "bbox": None}], 7, r"i.json: annotations\[1\]: bbox")])
def test_what_is_wrong_in_cocos_files_is_named(tmp_path, captions, boxes, image_id, says):
    """Its file and its place there; files that have nothing to do with each other are refused."""
    with pytest.raises(ValueError, match=says):
        generate_data.read_contexts(*coco_files(tmp_path, captions, boxes, image_id))


@pytest.mark.parametrize("bbox", [[300, 25, 20, 20], [50, 25, -20, 20], [10, 10, 2000, 20]])
def test_a_box_over_the_edge_is_cut_off_and_one_outside_is_named(tmp_path, capsys, bbox):
    """--skip_bad leaves out those that are no boxes of this picture; both are counted."""
    over = {"image_id": 7, "category_id": 6, "bbox": [103, 50, 100, 50]}
    files = coco_files(tmp_path, box_rows=[over])
    [context] = generate_data.read_contexts(*files)
    assert context.boxes.endswith("bus: [0.515, 0.5, 1.0, 1.0]")
    assert "1 boxes cut off at their picture's edge" in capsys.readouterr().out
    files = coco_files(tmp_path, box_rows=[{**over, "bbox": bbox}])
    with pytest.raises(ValueError, match=r"i.json: annotations\[1\]: box.*--skip_bad"):
        generate_data.read_contexts(*files)
    [context] = generate_data.read_contexts(*files, skip_bad=True)
    assert context.boxes == "bus: [0.1, 0.25, 0.53, 1.0]"
    assert "1 bad boxes, left out" in capsys.readouterr().out


@pytest.mark.parametrize("record, says", [
    ({**SHOP, "instances": [{"category": "bus", "bbox": [10, 20, 30, 40]}]}, "fractions"),
    ({**SHOP, "captions": [None, " "]}, "no captions"), ({**SHOP, "captions": [5]}, "captions: 5"),
    ({"id": 1, "captions": ["x"]}, "image"), ("text", "needed are id, image, captions")])
def test_a_bad_context_is_named(tmp_path, record, says):
    """What cannot be read must never become a paid request."""
    write_lines(tmp_path / "c.jsonl", [SHOP | {"id": "8"}, record])
    with pytest.raises(ValueError, match=r"c.jsonl\[1\].*") as error:
        generate_data.read_contexts(str(tmp_path / "c.jsonl"))
    assert says in str(error.value)


def test_the_few_shot_numbers_are_those_of_the_released_prompts():
    """Two examples of conversations, three of descriptions, three of reasoning; ours would pass."""
    prompts = generate_data.read_prompts()
    assert [len(shots) for _, shots in prompts.values()] == [2, 3, 3]
    assert len(generate_data.detail_questions()) == 16 and len(brief_instructions()) == 11
    for kind, (_, shots) in prompts.items():
        for shown, response in shots:
            assert ("\n\n" in shown) == (kind != "conversation"), "boxes where they do not belong"
            turns = generate_data.read_turns(kind, reply_of(response))    # else none could pass
            assert len(turns) == (6 if kind == "conversation" else 1)


def test_every_picture_gets_one_type_by_mix_and_so_many_by_numbers():
    """58 : 23 : 77 by default; more of one type by --numbers changes none that is paid for."""
    contexts = [generate_data.Context(str(i), f"{i}.jpg", "x") for i in range(1580)]

    def assign(**more):
        config = generate_data.Instruct(out="", captions="", **more)
        return generate_data.assign_types(contexts, config)

    pairs = assign()
    assert Counter(kind for kind, _ in pairs) == {
        "conversation": 580, "detail_description": 230, "complex_reasoning": 770}
    assert len({context.id for _, context in pairs}) == 1580
    assert pairs == assign() and pairs != assign(seed=1)
    few = assign(numbers=["conversation=20", "detail_description=30"])
    more = assign(numbers=["conversation=90", "detail_description=30"])
    assert len(few) == 50 and set(few) < set(more), "other pictures for what is paid already"


@pytest.mark.parametrize("flags, says", [
    ("--numbers conversation=2000", "there are 9 pictures"), ("--mix talk=3", "talk=3: TYPE=N"),
    ("--numbers conversation=1.5", "whole number"), ("--mix conversation=0", "not 0 for all"),
    ("--limit 0", "--limit 0"), ("--prompts nowhere", "nowhere")])
def test_a_flag_that_cannot_be_meant_is_named(tmp_path, flags, says):
    """Before anything is sent."""
    contexts = write_contexts(tmp_path / "c.jsonl", 9)
    with pytest.raises((ValueError, OSError), match=says):
        instruct(tmp_path, contexts, "--base_url", "http://127.0.0.1:9/v1", *flags.split())


@pytest.mark.parametrize("kind, text, turns", [
    ("conversation", "Question:\nWhy?\n===\nAnswer:\nSo.\n===\n", [("Why?", "So.")]),
    ("conversation", "Sure!\n**Question 1:** Why?\n**Answer 1:** So.\n### Question 2: Who?\n"
     "Answer: **I**", [("Why?", "So."), ("Who?", "**I**")]),
    ("conversation", "**Question: Why?**\n**Answer: So.**\nQuestion: And then",
     [("Why?", "So.")]),
    ("conversation", "## Question: Why? ##\n*A: So.*", [("Why?", "So.")]),
    ("conversation", "Q: Why?\nAnswer: So.\nQ: Who?\nAnswer:", [("Why?", "So.")]),
    ("conversation", "1. Q: Why?\nA: The bus\nA 3:15 leaves.",
     [("Why?", "The bus\nA 3:15 leaves.")]),
    ("conversation", "Question: Which?\nAnswer: There are\nA: red\nB: blue",
     [("Which?", "There are\nA: red\nB: blue")]),
    ("complex_reasoning", "Question: Why?\nAnswer: So.\nQuestion: Who?\nAnswer: I.",
     [("Why?", "So.")]),
    ("conversation", "What a nice picture.", []), ("complex_reasoning", "What a nice picture.", []),
    ("detail_description", " A bus.\n", [(None, "A bus.")]),
    ("detail_description", "**Detailed description:** A bus.\n---", [(None, "A bus.")]),
    ("detail_description", "Sure!\nAnswer: **A** bus in C#", [(None, "**A** bus in C#")]),
    ("detail_description", "Q: What?\nA: A bus.", [(None, "A bus.")]),
    ("detail_description", "The board reads\nA: Monday\nB: Tuesday.",
     [(None, "The board reads\nA: Monday\nB: Tuesday.")]),
    ("detail_description", "Question:\nWhat?\n===\nAnswer:\nA bus.", [(None, "A bus.")])])
def test_what_models_write_is_understood(kind, text, turns):
    """The form asked for, markdown, a last question without its answer, and letters, which are
    labels only where no word is one: else an answer that lists "A: red" would end before it. A
    description is the text itself: its question comes from our list, whatever heading it has."""
    assert generate_data.parse(kind, text) == turns


def about(answer):
    return f"Question:\nWhat?\n===\nAnswer:\n{answer}"


@pytest.mark.parametrize("text, finish, reason", [
    (about("According to the description, a bus."), "stop", "speaks of its context"),
    (about("A bus at [0.1, 0.25, 0.5, 1.0]."), "stop", "speaks of its context"),
    (about("As an AI language model, no."), "stop", "refuses"),
    (about("See <image>."), "stop", "STOP or special token"),
    (about("A bus.\n\n### Colours\nRed."), "stop", "STOP or special token"),
    (about("A <|im_end|> bus."), "stop", "STOP or special"),
    ("A bus.", "length", "cut off"), ("", "content_filter", "finish_reason content_filter"),
    ("A bus.", "MAX_TOKENS", "MAX_TOKENS"), ("A bus.", 5, "finish_reason 5"),
    ("<think>Question: What?\nAnswer: A bus.", "stop", "no question"),
    ("I'm sorry, I cannot help with that.", "stop", "refuses"),
    (about("A bus.\nAnswer: Or a tram."), "stop", "take turns"), (about(""), "stop", "no question"),
    (about("\nQuestion: Who?\nAnswer: I."), "stop", "take turns"),
    ("Certainly!", "stop", "no question and answer")])
def test_what_is_no_answer_about_the_picture_is_rejected_with_its_reason(text, finish, reason):
    """As if the assistant saw it; a half sentence would teach the model to stop in the middle."""
    with pytest.raises(generate_data.Reject, match=reason):
        generate_data.read_turns("conversation", reply_of(text, finish))


def test_no_answer_is_rejected_for_a_word_alone():
    """An end of turn behind it is no part of it."""
    answer = "The cardboard boxes stand in a bus, as the text on its side says."
    reply = reply_of(about(answer + "<|im_end|>"))
    assert generate_data.read_turns("conversation", reply) == [("What?", answer)]


def test_a_run_survives_a_lying_server_and_pays_for_nothing_twice(tmp_path, serve):
    """Every fault is asked again, each good reply becomes one record, a second run asks none."""
    contexts = write_contexts(tmp_path / "c.jsonl", 20)
    faults = {"500": 0.1, "reset": 0.05, "garbage": 0.05, "empty": 0.05, "half": 0.05}
    url, log = serve(faults=faults)
    flags = ["--base_url", url, "--workers", 8]
    records = instruct(tmp_path, contexts, *flags)
    asked = lines(log)
    good = Counter(row["last"] for row in asked if row["fault"] == "good")
    assert max(good.values()) == 1, "a request that had its reply was paid again"
    assert {record["image"] for record in records} == {f"p{i}.jpg" for i in range(20)}
    list(map(normal_record, records))    # none is refused
    before = (tmp_path / "out" / "instruct.json").read_bytes()
    instruct(tmp_path, contexts, *flags)
    assert len(lines(log)) == len(asked)
    assert (tmp_path / "out" / "instruct.json").read_bytes() == before


def test_a_repeated_example_is_no_record_and_the_metadata_know_the_prompts(tmp_path, serve):
    """A teacher may say again what it was shown; what it was shown is told by a hash."""
    contexts = write_contexts(tmp_path / "c.jsonl", 3)
    _, shots = generate_data.read_prompts()["conversation"]
    hashes = set()
    for folder in (PROMPTS, tmp_path / "prompts"):
        url, _ = serve(says={"number 1": shots[1][1]})
        records = instruct(tmp_path, contexts, "--base_url", url, "--mix", "conversation=1",
                           "--prompts", folder)
        assert len(records) == 2
        rejected = read_lines(tmp_path / "out" / "rejected.jsonl")
        assert [(row["id"], row["reason"]) for row in rejected] == [
            ("p1-conversation", "repeats an example")]
        metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
        assert metadata["counts"]["conversation, rejected: repeats an example"] == 1
        hashes.add(metadata["prompts"])
        if folder == PROMPTS:
            shutil.copytree(PROMPTS, tmp_path / "prompts")
            (tmp_path / "prompts" / "conversation" / "system_message.txt").write_text("Write.")
    assert len(hashes) == 2


def test_every_templates_stop_ends_an_answer_too_early():
    """Of Table 2 and all others; a line's end, "plain"'s STOP, is in no caption that we read."""
    for template in TEMPLATES.values():
        stop = template.STOP.strip()
        assert not stop or HOLDS_STOP.search(f"a bus {stop} red"), template.name
    assert not HOLDS_STOP.search("a <b>bus</b>, #1 of 3 < 4 | 5 > 2")


def test_a_changed_filter_costs_nothing(tmp_path, serve, monkeypatch):
    """instruct.json is made anew from raw.jsonl each time; equal answers stay if they may."""
    contexts = write_contexts(tmp_path / "c.jsonl", 5)
    url, log = serve(text="Question:\nWhat?\n===\nAnswer:\nThe caption says so.")
    assert instruct(tmp_path, contexts, "--base_url", url, "--mix", "conversation=1") == []
    monkeypatch.setattr(generate_data, "REJECTED", {})
    nowhere = ("--base_url", "http://127.0.0.1:9/v1", "--mix", "conversation=1")
    assert len(instruct(tmp_path, contexts, *nowhere)) == 1, "equal answers are one record"
    assert len(instruct(tmp_path, contexts, *nowhere, "--keep_duplicates")) == 5
    assert len(lines(log)) == 5
    made = (tmp_path / "out" / "instruct.json").read_bytes()
    with pytest.raises(ValueError, match="5 of 5 requests have no reply yet"):
        instruct(tmp_path, contexts, *nowhere, "--temperature", 0.5, "--attempts", 1)
    assert (tmp_path / "out" / "instruct.json").read_bytes() == made, "another run's file is lost"


def test_show_and_estimate_send_nothing(tmp_path, capsys):
    """Look before you pay: whole requests, and their number, tokens, money and hours."""
    contexts = write_contexts(tmp_path / "c.jsonl", 158)
    flags = ["instruct", "--captions", str(contexts), "--out", str(tmp_path / "out"),
             "--base_url", "http://127.0.0.1:9/v1", "--language", "German"]
    generate_data.main([*flags, "--show", "2"])
    shown = capsys.readouterr().out
    assert shown.count("[system]") == 2 and "Write in German" in shown and "number" in shown
    generate_data.main([*flags, "--estimate", "--price_in", "30", "--price_out", "60",
                        "--rpm", "1"])
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("all"))
    n, tokens_in, tokens_out, money = re.findall(r"[\d.]+", row.replace(",", ""))
    cost = int(tokens_in) * 30 + int(tokens_out) * 60
    assert n == "158" and float(money) == pytest.approx(cost / 1e6, abs=0.01)
    assert "2.6 hours" in shown and not (tmp_path / "out").exists()


def test_naive_expansion_asks_one_of_the_brief_instructions(tmp_path):
    """Stage 1: Human: X_q X_v, Assistant: X_c; the picture stands first or last."""
    write_lines(tmp_path / "p.jsonl", [{"image": f"{i}.jpg", "caption": f"a dog {i}"}
                                       for i in range(200)])
    generate_data.main(["expand", "--pairs", str(tmp_path / "p.jsonl"),
                        "--out", str(tmp_path / "chat.json")])
    records = list(read_json(tmp_path / "chat.json"))
    questions = [record["conversations"][0]["value"] for record in records]
    assert {q.replace("<image>", "").strip() for q in questions} == set(brief_instructions())
    assert 60 < sum(q.startswith("<image>") for q in questions) < 140
    assert [r["conversations"][1]["value"] for r in records] == [f"a dog {i}" for i in range(200)]

