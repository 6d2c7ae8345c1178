"""Where the data comes from (Sec. 3): contexts, prompts, a client that loses nothing, records."""
import json
import random
from collections import Counter

import pytest
from conftest import lines

import generate_data
from extras import concept_filter, llava_bench
from parts.files import brief_instructions, read_json, read_lines, record_problem, write_lines

SHOP = {"id": "7", "image": "7.jpg", "captions": ["A red bus at a shop.", "A bus  stops."],
        "instances": [{"category": "bus", "bbox": [0.1, 0.25, 0.53004, 1]}]}


def write_contexts(path, n):
    """n pictures whose last caption is their name, which the test's server quotes."""
    rows = [{"id": f"p{i}", "image": f"p{i}.jpg", "captions": ["a picture", f"number {i}"]}
            for i in range(n)]
    write_lines(path, rows)
    return path


def instruct(tmp_path, contexts, *flags):
    argv = ["instruct", "--captions", contexts, "--out", tmp_path / "out", "--model", "m", *flags]
    generate_data.main([str(word) for word in argv])
    return json.loads((tmp_path / "out" / "instruct.json").read_text())


def test_a_context_is_captions_and_normalised_corners():
    """Table 1, top: boxes are `category: [x1, y1, x2, y2]`; a conversation sees captions alone."""
    context = generate_data.from_record(SHOP)
    assert context.captions == "A red bus at a shop.\nA bus stops."
    assert context.boxes == "bus: [0.1, 0.25, 0.53, 1.0]"
    assert generate_data.context_text("conversation", context) == context.captions
    assert context.boxes in generate_data.context_text("complex_reasoning", context)


def test_coco_files_and_json_lines_give_the_same_contexts(tmp_path):
    """COCO's own boxes are x, y, width, height in pixels."""
    images = [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}]
    texts = [{"image_id": 7, "caption": text} for text in SHOP["captions"]]
    boxes = [{"image_id": 7, "category_id": 6, "bbox": [20, 25, 86.008, 75]}]
    names = [{"id": 6, "name": "bus"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": texts}))
    (tmp_path / "i.json").write_text(json.dumps(
        {"images": images, "annotations": boxes, "categories": names}))
    write_lines(tmp_path / "c.jsonl", [SHOP])
    found = generate_data.read_contexts(str(tmp_path / "c.json"), str(tmp_path / "i.json"))
    assert found == generate_data.read_contexts(str(tmp_path / "c.jsonl"))


@pytest.mark.parametrize("record, says", [
    ({**SHOP, "instances": [{"category": "bus", "bbox": [10, 20, 30, 40]}]}, "fractions"),
    ({**SHOP, "captions": []}, "no captions"), ({"id": 1, "captions": ["x"]}, "image"),
    ("text", "needed are id, image, captions")])
def test_a_bad_context_is_named(tmp_path, record, says):
    """What cannot be read must never become a paid request."""
    write_lines(tmp_path / "c.jsonl", [SHOP | {"id": "8"}, record])
    with pytest.raises(ValueError, match=r"c.jsonl\[1\].*") as error:
        generate_data.read_contexts(str(tmp_path / "c.jsonl"))
    assert says in str(error.value)


def test_the_few_shot_numbers_are_the_papers():
    """Two examples of conversations, three of descriptions, three of reasoning."""
    prompts = generate_data.read_prompts()
    assert [len(shots) for _, shots in prompts.values()] == [2, 3, 3]


@pytest.mark.parametrize("text, turns", [
    ("Question:\nWhy?\n===\nAnswer:\nSo.\n===\n", [("Why?", "So.")]),
    ("**Question 1:** Why?\n**Answer 1:** So.\n\n2. Q: Who?\nA: I.",
     [("Why?", "So."), ("Who?", "I.")]),
    ("Question: Why?\nAnswer: So.\nQuestion: And then", [("Why?", "So.")]),
    ("What a nice picture.", [])])
def test_what_models_write_is_understood(text, turns):
    """The form asked for, markdown, short labels, a last question without its answer."""
    assert generate_data.parse("conversation", text) == turns


def test_a_run_survives_a_lying_server_and_pays_for_nothing_twice(tmp_path, serve):
    """Every fault is asked again, each good reply becomes one record, a second run asks none."""
    contexts = write_contexts(tmp_path / "c.jsonl", 40)
    faults = {"429": 0.05, "500": 0.1, "reset": 0.05, "garbage": 0.05, "empty": 0.05, "half": 0.05}
    url, log = serve(faults=faults)
    flags = ["--base_url", url, "--workers", 8]
    records = instruct(tmp_path, contexts, *flags)
    asked = lines(log)
    good = Counter(row["last"] for row in asked if row["fault"] == "good")
    assert max(good.values()) == 1, "a request that had its reply was paid again"
    assert {record["image"] for record in records} == {f"p{i}.jpg" for i in range(40)}
    assert not any(record_problem(record, "images") for record in records)
    before = (tmp_path / "out" / "instruct.json").read_bytes()
    instruct(tmp_path, contexts, *flags)
    assert len(lines(log)) == len(asked)
    assert (tmp_path / "out" / "instruct.json").read_bytes() == before


def test_refusals_and_replies_that_speak_of_captions_are_rejected_and_counted(tmp_path, serve):
    """What betrays that its writer saw no picture is no data; it lies in rejected.jsonl."""
    contexts = write_contexts(tmp_path / "c.jsonl", 6)
    bad = "Question:\nWhat?\n===\nAnswer:\nThe caption says so."
    url, _ = serve(says={"number 1": bad})
    records = instruct(tmp_path, contexts, "--base_url", url, "--mix", "conversation=1")
    rejected = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert len(records) == 5
    assert [(row["id"], row["reason"]) for row in rejected] == [
        ("p1-conversation", "speaks of its context")]


def test_what_will_not_pass_stops_the_run_with_the_servers_words(tmp_path, serve, monkeypatch):
    """A wrong key ends it at once, and is not in the message."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET")
    url, log = serve(key="another")
    with pytest.raises(ValueError, match="401") as error:
        instruct(tmp_path, write_contexts(tmp_path / "c.jsonl", 3), "--base_url", url,
                 "--workers", 1)
    assert "SECRET" not in str(error.value) and "0 of 3 replies are kept" in str(error.value)
    assert len(lines(log)) <= 2, "the run went on asking"


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


def test_a_bench_has_a_question_of_each_type_and_a_reference_answer(tmp_path, serve):
    """LLaVA-Bench (COCO)'s construction: its three files agree, and eval.py can join them."""
    url, _ = serve()
    llava_bench.main(["--bench", "3", "--captions", str(write_contexts(tmp_path / "c.jsonl", 5)),
                      "--out", str(tmp_path / "bench"), "--base_url", url, "--model", "m"])
    questions = read_lines(tmp_path / "bench" / "questions.jsonl")
    reference = read_lines(tmp_path / "bench" / "reference.jsonl")
    context = read_lines(tmp_path / "bench" / "context.jsonl")
    assert Counter(q["category"] for q in questions) == {"conv": 3, "detail": 3, "complex": 3}
    assert [r["question_id"] for r in reference] == [q["question_id"] for q in questions]
    assert {q["image"] for q in questions} == {c["image"] for c in context}


def test_the_concept_filter_equals_a_slow_loop():
    """From the rarest frequent phrase up, each adds all its captions, or `most` random ones."""
    rng = random.Random(0)
    phrases = [{f"p{int(rng.expovariate(0.3))}" for _ in range(3)} for _ in range(300)]
    stays, before, after = concept_filter.concept_filter(phrases, most=300, least=4)
    counts = Counter(phrase for found in phrases for phrase in found)
    want = [any(counts[phrase] >= 4 for phrase in found) for found in phrases]
    assert stays.tolist() == want
    assert sorted(before) == sorted(counts.values())
    few, _, _ = concept_filter.concept_filter(phrases, most=5, least=4)
    assert few.sum() < stays.sum()


def test_phrases_are_the_words_between_function_words():
    """OURS: a rough finder that needs no tagger."""
    found, = concept_filter.light_phrases(["A small dog sits on the wooden bench."])
    assert found == {"small dog", "wooden bench"}
