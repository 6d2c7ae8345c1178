"""Where the data comes from (Sec. 3): contexts, prompts, a client that survives, nothing lost, nothing twice, clean records."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import data
import generate_data as gd
import toy
from conftest import ROOT, lines, run_script, start_script
from records import brief_instructions, form_problem

SHOP = {"id": "000000000007", "image": "000000000007.jpg", "captions": ["A red bus in front of a shop.", "A bus  stops."],
        "instances": [{"category": "bus", "bbox": [0.1, 0.25, 0.53004, 1]}, {"category": "person", "bbox": [0, 0.5, 0.1, 0.9]}]}


def write_contexts(path, n):
    """n pictures whose last caption is their name, which the test's server quotes."""
    path.write_text("".join(json.dumps({"id": f"p{i}", "image": f"p{i}.jpg", "captions": ["a picture", f"number {i}"]}) + "\n"
                            for i in range(n)))
    return path


def instruct(tmp_path, contexts, *flags, out="out"):
    gd.main(["instruct", "--captions", str(contexts), "--out", str(tmp_path / out), "--model", "m", *map(str, flags)])
    return json.loads((tmp_path / out / "instruct.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Context and prompts


def test_a_context_is_captions_and_normalised_corners():
    """Table 1, top: a box is `category: [x1, y1, x2, y2]`, corners as fractions, three decimals, of the original picture."""
    context = gd.from_record(SHOP)
    assert context.captions == "A red bus in front of a shop.\nA bus stops."
    assert context.boxes == "bus: [0.1, 0.25, 0.53, 1.0]\nperson: [0.0, 0.5, 0.1, 0.9]"
    assert gd.context_text("conversation", context) == context.captions, "a conversation is made from captions alone"
    assert gd.context_text("complex_reasoning", context) == f"{context.captions}\n\n{context.boxes}"
    sign = gd.from_record({"id": 3, "image": "a/3.jpg", "captions": ["a door"], "notes": ["text on the sign: CLOSED"]})
    assert sign == ("3", "a/3.jpg", "a door\ntext on the sign: CLOSED", "")


def test_coco_files_and_json_lines_give_the_same_contexts(tmp_path):
    """COCO's own boxes are [x, y, width, height] in pixels."""
    coco = {"info": {"annotations": "not these"},
            "images": [{"id": 7, "file_name": "000000000007.jpg", "width": 200, "height": 100}]}
    said = [{"image_id": 7, "caption": "A red bus in front of a shop."}, {"image_id": 7, "caption": "A bus stops.\n"}]
    boxes = [{"image_id": 7, "category_id": 6, "bbox": [20, 25, 86.008, 75], "segmentation": [[1.5, 2.5]], "iscrowd": 0},
             {"image_id": 7, "category_id": 1, "bbox": [0, 50, 20, 40], "segmentation": {"counts": [3], "size": [1, 2]}},
             {"image_id": 7, "category_id": 1, "bbox": [10, 50, 20, 0]}]     # a line without area, as COCO itself has
    names = [{"id": 6, "name": "bus"}, {"id": 1, "name": "person"}]
    (tmp_path / "c.json").write_text(json.dumps({**coco, "annotations": said}))
    (tmp_path / "i.json").write_text(json.dumps({**coco, "categories": names, "annotations": boxes}))
    (tmp_path / "c.jsonl").write_text(json.dumps(SHOP) + "\n")
    from_lines = gd.read_contexts(str(tmp_path / "c.jsonl"))
    assert gd.read_contexts(str(tmp_path / "c.json"), str(tmp_path / "i.json")) == from_lines
    assert gd.read_contexts(str(tmp_path / "c.json")) == [from_lines[0]._replace(boxes="")], "captions alone will do"


@pytest.mark.parametrize("record, says", [
    ({**SHOP, "instances": [{"category": "bus", "bbox": [10, 20, 30, 40]}]}, "fractions"),
    ({**SHOP, "instances": [{"category": "bus", "bbox": [0.5, 0.2, 0.5, 0.4]}]}, "x1 < x2"),
    ({**SHOP, "captions": "A red bus."}, "captions must be a list of strings, found 'A red bus.'"),
    ({**SHOP, "captions": []}, "no captions"), ({"id": 1, "captions": ["x"]}, "image"),
    ("text", "needed are id, image, captions")])
def test_a_bad_context_is_named(tmp_path, record, says):
    (tmp_path / "c.jsonl").write_text(json.dumps({**SHOP, "id": "a"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"c\.jsonl\[1\].*" + says):
        gd.read_contexts(str(tmp_path / "c.jsonl"))


def test_the_few_shot_examples_are_2_3_and_3():
    """Sec. 3; and our own examples pass our own parser and checks, or no reply like them could."""
    prompts = gd.read_prompts(gd.Instruct.prompts)
    assert [len(shots) for _, shots in prompts.values()] == [2, 3, 3]
    args = gd.Instruct(out="", captions="")
    for kind, (system, shots) in prompts.items():
        said = gd.messages(system, shots, "the query")
        assert [m["role"] for m in said] == ["system", *["user", "assistant"] * len(shots), "user"]
        assert said[-1]["content"] == "the query" and said[1]["content"] == shots[0][0]
        for i, (caps, answer) in enumerate(shots):
            captions, _, boxes = caps.partition("\n\n")
            assert len(captions.splitlines()) == 5 and bool(boxes) == (kind != "conversation")
            request = gd.Request(str(i), kind, gd.Context("1", "1.jpg", captions, boxes), {})
            record = gd.record_of(request, {"choices": [{"message": {"content": answer}}]}, args, gd.Sketches())
            assert not form_problem(record, ".")
            assert len(record["conversations"]) == (12 if kind == "conversation" else 2)
    assert len(gd.detail_questions()) == 16 and len(brief_instructions()) == 11


def test_every_picture_gets_one_type_by_mix_and_so_many_by_numbers():
    contexts = [gd.Context(str(i), f"{i}.jpg", "x") for i in range(1580)]
    make = lambda **more: gd.draw(contexts, gd.Instruct(out="", captions="", **more))
    pairs = make()
    assert Counter(kind for kind, _ in pairs) == {"conversation": 580, "detail_description": 230, "complex_reasoning": 770}
    assert len({c.id for _, c in pairs}) == 1580 and pairs == make() and pairs != make(seed=1)
    assert Counter(kind for kind, _ in make(numbers=["detail_description=5", "conversation=1580"])) == {
        "detail_description": 5, "conversation": 1580}
    with pytest.raises(ValueError, match="2000, but there are 1580"):
        make(numbers=["conversation=2000"])
    with pytest.raises(ValueError, match="talk=3"):
        make(mix=["talk=3"])
    few, more = (make(numbers=[f"conversation={n}", "detail_description=30"]) for n in (20, 90))
    assert set(few) < set(more), "more conversations drew other pictures for what is paid already"


def test_detail_questions_are_those_of_the_prompt_folder(serve, tmp_path):
    """Another language needs other questions; the check of the language reads what the teacher wrote."""
    shutil.copytree(gd.Instruct.prompts, tmp_path / "prompts")
    url, _ = serve(text="这是一辆公共汽车，停在商店前面。")
    contexts = write_contexts(tmp_path / "c.jsonl", 1)
    flags = ("--base_url", url, "--mix", "detail_description=1", "--language", "Chinese")
    assert len(instruct(tmp_path, contexts, *flags)) == 1, "our English question was taken for the teacher's words"
    (tmp_path / "prompts" / "detail_instructions.txt").write_text("请描述这张图片。\n")
    asked = instruct(tmp_path, contexts, *flags, "--prompts", tmp_path / "prompts")[0]["conversations"][0]["value"]
    assert asked.replace("<image>", "").strip() == "请描述这张图片。"
    (tmp_path / "prompts" / "detail_instructions.txt").unlink()
    with pytest.raises(FileNotFoundError, match="detail_instructions.txt: no such file"):
        instruct(tmp_path, contexts, *flags, "--prompts", tmp_path / "prompts")


# ---------------------------------------------------------------------------------------------------------------------
# What models return


PAIR = [("What is it?", "A bus.")]


@pytest.mark.parametrize("text, turns", [
    ("Question:\nWhat is it?\n===\nAnswer:\nA bus.", PAIR),
    ("Question: What is it?\n===\nAnswer: A bus.\n===\nQuestion:\nAnd why?", PAIR),
    ("**Question:** What is it?\n\n**Answer:** A bus.\n", PAIR),
    ("Q: What is it?\nA: A bus.\nQ: Why?\nA: It stops.", PAIR + [("Why?", "It stops.")]),
    ("Here you are:\n\n1. Question: What is it?\n   Answer: A bus.\n2. Question: Why?\n   Answer: It stops.",
     PAIR + [("Why?", "It stops.")]),
    ("### Question 1:\nWhat is it?\n---\n### Answer 1:\nA bus.", PAIR),
    ("Frage:\nWas ist es?\n===\nAntwort:\nEin Bus.\n===\n", [("Was ist es?", "Ein Bus.")]),
    ("问题：\n这是什么？\n===\n回答：\n公共汽车。", [("这是什么？", "公共汽车。")]),
    ("What is it?\n===\nA bus.", PAIR),
    ("Question:\nWhat is it?\n===\nAnswer:\nA bus: red.\n\nAlso: a shop.", [("What is it?", "A bus: red.\n\nAlso: a shop.")])])
def test_parse_understands_what_models_return(text, turns):
    assert gd.parse("conversation", text) == turns
    assert gd.parse("complex_reasoning", text) == turns[:1]


@pytest.mark.parametrize("text", ["", "Certainly!", "Question:\nWhat is it?", "Answer: A bus.",
                                  "Question:\n===\nAnswer:\nA bus."])
def test_parse_rejects_what_holds_no_question_and_answer(text):
    with pytest.raises(gd.Reject, match="no question and answer"):
        gd.parse("conversation", text)
    for kind in gd.TYPES[::2]:
        with pytest.raises(gd.Reject, match="refuses"):
            gd.parse(kind, "I'm sorry, I cannot help with that.")


def test_a_description_is_the_text_itself():
    assert gd.parse("detail_description", " A bus.\n\nIt is red.\n") == [(None, "A bus.\n\nIt is red.")]
    assert gd.parse("detail_description", "**Detailed description:** A bus.") == [(None, "A bus.")]
    assert gd.parse("detail_description", "Question:\nWhat?\n===\nAnswer:\nA bus.") == [(None, "A bus.")]
    with pytest.raises(gd.Reject):
        gd.parse("detail_description", " \n")


@pytest.mark.parametrize("answer, reason", [
    ("According to the description, a bus.", "speaks of its context"), ("The captions say a bus.", "speaks of its context"),
    ("A bus at [0.1, 0.25, 0.5, 1.0].", "speaks of its context"), ("Its bounding box is large.", "speaks of its context"),
    ("The provided text does not say.", "speaks of its context"), ("I'm sorry, I cannot see it.", "refuses"),
    ("As an AI language model, no.", "refuses"), ("See <image>.", "names the image token"), ("Это автобус.", "wrong language"),
    ("The cardboard boxes stand in a red bus, as the text on its side says.", None)])
def test_a_record_speaks_of_the_picture(answer, reason):
    """Sec. 3: as if the assistant saw the picture."""
    request = gd.Request("1", "conversation", gd.Context("1", "1.jpg", "x"), {})
    args = gd.Instruct(out="", captions="", language="English")
    reply = {"choices": [{"message": {"content": f"Question:\nWhat?\n===\nAnswer:\n{answer}"}}]}
    if reason is None:
        assert gd.record_of(request, reply, args, gd.Sketches())["conversations"][1]["value"] == answer
    else:
        with pytest.raises(gd.Reject, match=reason):
            gd.record_of(request, reply, args, gd.Sketches())


def test_the_script_of_a_language_is_known():
    assert gd.in_script("这是一辆公共汽车。", "Chinese") and not gd.in_script("这是一辆公共汽车。", "Japanese")
    assert gd.in_script("これは赤いバスです。", "Japanese") and gd.in_script("Ein Bus – schön!", "German")
    assert not gd.in_script("It is a bus. 公", "Chinese")


def test_near_duplicates_are_found_and_short_or_different_texts_are_not():
    rng, sketches = random.Random(0), gd.Sketches()
    texts = [" ".join(rng.choice("abcdefghijklmnopqrstuvwxyz") * rng.randint(1, 3) for _ in range(60)) for _ in range(300)]
    assert not any(sketches.twin(str(i), text) for i, text in enumerate(texts)), "random texts were taken for twins"
    again = [f"Well, {text.replace(' ', '  ').upper()}!" for text in texts]
    assert all(sketches.twin(f"again {i}", text) == str(i) for i, text in enumerate(again)), "copies were not seen"
    assert not sketches.twin("x", "It is a red bus.") and not sketches.twin("y", "It is a red bus.")
    chinese = ["".join(rng.choice("一辆红色的公共汽车停在商店前面有人等") for _ in range(60)) for _ in range(50)]
    assert not any(sketches.twin(f"zh {i}", text) for i, text in enumerate(chinese))
    assert all(sketches.twin(f"zh again {i}", f"好，{text}。") == f"zh {i}" for i, text in enumerate(chinese))


def test_a_character_of_a_script_without_blanks_is_a_token():
    assert gd.count_tokens("A red bus, 12345 times.") == 8 and gd.count_tokens("一辆红色的公共汽车。") == 10


def test_the_picture_stands_before_or_after_the_first_question_at_random():
    """Eq. (2): half of the time each, and the other turns are as they are."""
    rng, turns = random.Random(0), [("Why?", "So."), ("And?", "Yes.")]
    said = [gd.conversation(turns, rng) for _ in range(400)]
    firsts = Counter(turns[0]["value"] for turns in said)
    assert set(firsts) == {"<image>\nWhy?", "Why?\n<image>"} and min(firsts.values()) > 150
    assert [t["value"] for t in said[0][1:]] == ["So.", "And?", "Yes."]
    assert [t["from"] for t in said[0]] == ["human", "gpt"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The client


@pytest.mark.parametrize("fault, reason", [
    ("429", "HTTP 429"), ("500", "HTTP 500"), ("503", "HTTP 503"), ("reset", "connection lost"), ("half", "connection lost"),
    ("garbage", "not a chat completion"), ("shape", "not a chat completion"), ("empty", "empty answer"), ("hang", "timeout")])
def test_what_may_pass_is_told_apart(serve, fault, reason):
    url, _ = serve(faults={fault: 1.0})
    with pytest.raises(gd.TryAgain) as raised:
        gd.ask(url, {"model": "m", "messages": [{"content": "x"}]}, timeout=1)
    assert raised.value.reason == reason and raised.value.after == (1.0 if fault == "429" else None)


@pytest.mark.parametrize("url, reason", [("http://127.0.0.1:9/v1", "connection refused"),
                                         ("http://no.such.host.invalid/v1", "unknown host")])
def test_a_dead_or_mistyped_endpoint_is_named_in_the_first_note(tmp_path, capsys, url, reason):
    with pytest.raises(ValueError, match="1 of 1 requests have no reply"):
        instruct(tmp_path, write_contexts(tmp_path / "c.jsonl", 1), "--base_url", url, "--attempts", 1)
    assert f"{url}/chat/completions: {reason}" in capsys.readouterr().err.splitlines()[0]
    assert not (tmp_path / "out" / "instruct.json").exists(), "an empty file was written"


@pytest.mark.parametrize("code", ["400", "401", "403", "404"])
def test_what_will_not_pass_stops_with_the_servers_words_and_without_the_key(serve, code, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    url, _ = serve(faults={code: 1.0})
    with pytest.raises(ValueError, match=f"HTTP {code}.*{code} it is") as raised:
        gd.ask(url, {"model": "m", "messages": [{"content": "x"}]})
    assert "secret" not in str(raised.value)


def test_retry_after_is_seconds_or_a_date():
    assert gd.retry_after("7") == 7 and gd.retry_after(None) is None and gd.retry_after("soon") is None
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < gd.retry_after(later) <= 30


@pytest.mark.parametrize("finish, reason", [("length", "cut off at max_tokens"), ("content_filter", "content filter")])
def test_a_cut_or_filtered_answer_is_paid_kept_and_rejected(serve, tmp_path, finish, reason):
    url, log = serve(finish=finish)
    contexts = write_contexts(tmp_path / "c.jsonl", 3)
    assert instruct(tmp_path, contexts, "--base_url", url) == []
    assert {row["reason"] for row in lines(tmp_path / "out" / "rejected.jsonl")} == {reason}
    instruct(tmp_path, contexts, "--base_url", url)
    assert len(lines(log)) == 3, "what was paid once was asked again"


def test_a_permanent_error_stops_the_run_and_keeps_what_is_on_its_way(serve, tmp_path):
    url, log = serve(seconds=0.3, faults={"404": 0.1}, seed=2)
    with pytest.raises(ValueError, match="HTTP 404.* of 100 replies are kept in .*raw.jsonl; run the same command") as raised:
        instruct(tmp_path, write_contexts(tmp_path / "c.jsonl", 100), "--base_url", url, "--workers", 8)
    asked = Counter(row["fault"] for row in lines(log))
    assert sum(asked.values()) < 100, "it went on after an error that will not pass"
    assert len(lines(tmp_path / "out" / "raw.jsonl")) == asked["good"] > 0, "a reply that was on its way is lost"
    assert f"{asked['good']} of 100" in str(raised.value)
    kept = json.loads((tmp_path / "out" / "instruct.json").read_text()) + lines(tmp_path / "out" / "rejected.jsonl")
    assert len(kept) == asked["good"], "what is paid cannot be used"
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["replies"] == asked["good"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_for_what_is_under_way_and_a_second_one_does_not(serve, tmp_path, times):
    """And neither says of a reply that it is kept if it is not."""
    url, log = serve(seconds=times)
    process = start_script(tmp_path, "generate_data.py", "instruct", "--captions", write_contexts(tmp_path / "c.jsonl", 30),
                           "--out", tmp_path / "out", "--base_url", url, "--workers", 4, "--keep_duplicates")
    while not (log.exists() and len(lines(log)) >= 5):       # one is kept, others are under way
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    if times == 2:
        while "stopping: waiting for" not in (tmp_path / "output").read_text():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
    stopped = time.monotonic()
    process.join(20)
    asked, said = len(lines(log)), (tmp_path / "output").read_text()
    kept = len(lines(tmp_path / "out" / "raw.jsonl"))
    assert "stopping: waiting for" in said and f"{kept} of 30 replies are kept in" in said.splitlines()[-1], said
    if times == 1:
        assert process.exitcode == 1 and 4 < kept == asked < 30 and said.splitlines()[-1].startswith("stopped")
        assert len(json.loads((tmp_path / "out" / "instruct.json").read_text())) == kept
    else:
        assert process.exitcode == 130 and 0 < kept < asked and time.monotonic() - stopped < 1
        assert "replies under way are not kept" in said.splitlines()[-1]


def test_a_full_disk_leaves_whole_lines_and_says_what_is_kept(serve, tmp_path):
    url, _ = serve()
    command = ("generate_data.py", "instruct", "--captions", write_contexts(tmp_path / "c.jsonl", 30), "--out",
               tmp_path / "out", "--base_url", url, "--workers", 4, "--mix", "conversation=1")
    code, said = run_script(tmp_path, *command, file_size=4000)
    kept = len(lines(tmp_path / "out" / "raw.jsonl"))
    assert code == 1 and 0 < kept < 30 and f"{kept} of 30 replies are kept in" in said.splitlines()[-1], said
    assert run_script(tmp_path, *command)[0] == 0
    assert len(lines(tmp_path / "out" / "raw.jsonl")) == 30


def test_the_key_is_sent_but_never_written(serve, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    url, _ = serve(key="sk-secret-1234", faults={"500": 0.3})
    assert len(instruct(tmp_path, write_contexts(tmp_path / "c.jsonl", 12), "--base_url", url, "--attempts", 20)) == 12
    written = "".join(p.read_text() for p in (tmp_path / "out").iterdir())
    assert "secret" not in written + "".join(capfd.readouterr())


def test_budgets_hold(tmp_path):
    """At most `rpm` requests and `tpm` tokens a minute, evenly spaced."""
    for limits in ({"rpm": 1200}, {"tpm": 120000}):
        began, times = time.monotonic(), []
        jobs = ((i, 100) for i in range(11))
        gd.ask_all(jobs, lambda job: times.append(time.monotonic()), lambda job, reply: None, workers=8, **limits)
        early = began + 0.05 * np.arange(11) - np.sort(times)                # of its slot, which a busy machine only puts off
        assert early.max() < 0.005 and 0.48 < time.monotonic() - began < 1.5, early
        assert np.median(np.diff(np.sort(times))) > 0.035, times


def test_a_failing_server_is_asked_a_bounded_number_of_times(serve, tmp_path):
    url, log = serve(faults={"500": 1.0})
    with pytest.raises(ValueError, match="4 of 4 requests have no reply.*HTTP 500.*the same command"):
        instruct(tmp_path, write_contexts(tmp_path / "c.jsonl", 4), "--base_url", url, "--attempts", 2)
    assert len(lines(log)) == 8


FAULTS = {"429": 0.05, "500": 0.05, "reset": 0.04, "half": 0.04, "garbage": 0.04, "unparsable": 0.04}


@pytest.mark.slow
def test_through_faults_no_sample_is_lost_or_doubled(serve, tmp_path):
    """320 requests, 64 workers: each has one record with its own words, or one reject with its reason."""
    url, log = serve(seconds=0.2, faults=FAULTS)
    contexts = write_contexts(tmp_path / "c.jsonl", 320)
    records = instruct(tmp_path, contexts, "--base_url", url, "--workers", 64, "--mix", "conversation=1", "--attempts", 20)
    rejects = lines(tmp_path / "out" / "rejected.jsonl")
    names = [r["id"] for r in records + rejects]
    assert sorted(names) == sorted(f"p{i}-conversation" for i in range(320))
    for r in records:
        assert r["conversations"][1]["value"] == f"It is about number {r['id'][1:-13]}.", "another picture's answer"
    asked = Counter(row["fault"] for row in lines(log))
    assert {row["reason"] for row in rejects} == {"no question and answer"} and len(rejects) == asked["unparsable"] > 0
    assert min(asked.values()) > 0 and asked["good"] + asked["unparsable"] == 320


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(serve, tmp_path):
    """SIGKILL, again and again; a torn last line; then the records equal those of a run that nobody disturbed."""
    url, log = serve(seconds=0.15, faults={"500": 0.05, "reset": 0.05, "half": 0.05})
    contexts, rng = write_contexts(tmp_path / "c.jsonl", 80), random.Random(0)
    command = ("generate_data.py", "instruct", "--captions", contexts, "--out", tmp_path / "out", "--base_url", url,
               "--model", "m", "--workers", 4, "--mix", "conversation=1", "--attempts", 20)
    raw, kills = tmp_path / "out" / "raw.jsonl", 0
    for _ in range(3):
        before, process = raw.stat().st_size if raw.exists() else 0, start_script(tmp_path, *command)
        while process.is_alive() and (not raw.exists() or raw.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.1, 0.6))
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            with open(raw, "ab") as f:
                f.write(b'{"key": "0123", "repl')
    assert kills == 3
    code, said = run_script(tmp_path, *command)
    assert code == 0, said
    assert len({row["id"] for row in lines(raw)}) == len(lines(raw)) == 80
    told = Counter(row["fault"] for row in lines(log))
    assert told["good"] <= 80 + 3 * 4, "more was asked twice than what was on its way at a kill"
    assert len(json.loads((tmp_path / "out" / "instruct.json").read_text())) == 80


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_outputs_are_made_again_from_the_raw_file_without_a_request(serve, tmp_path, capsys):
    """A change of the parser or the filter costs nothing."""
    url, log = serve(text="Question:\nWhat?\n===\nAnswer:\nThe caption says so.")
    contexts = write_contexts(tmp_path / "c.jsonl", 5)
    assert instruct(tmp_path, contexts, "--base_url", url) == []
    gd.SPEAKS_OF, before = {}, gd.SPEAKS_OF
    try:
        assert len(instruct(tmp_path, contexts, "--base_url", "http://127.0.0.1:9/v1", "--keep_duplicates")) == 5
    finally:
        gd.SPEAKS_OF = before
    assert len(lines(log)) == 5
    assert "5 replies, 5 of them to these 5 requests; 0 are new" in capsys.readouterr().out


def test_a_torn_line_in_the_middle_is_told_and_its_request_asked_again(serve, tmp_path, capsys):
    url, log = serve()
    flags = (write_contexts(tmp_path / "c.jsonl", 5), "--base_url", url, "--keep_duplicates")
    instruct(tmp_path, *flags)
    raw = tmp_path / "out" / "raw.jsonl"
    first, second, *rest = raw.read_bytes().splitlines(keepends=True)
    raw.write_bytes(b"".join((first, second[:40] + b"\n", *rest)))
    assert len(instruct(tmp_path, *flags)) == 5 and len(lines(log)) == 6
    assert "raw.jsonl, line 2: torn" in (said := capsys.readouterr().out) and "4 of them to these 5 requests; 1 are new" in said


def test_settings_that_no_reply_fits_leave_the_outputs_alone(serve, tmp_path):
    url, _ = serve()
    contexts = write_contexts(tmp_path / "c.jsonl", 3)
    made = instruct(tmp_path, contexts, "--base_url", url)
    for flags in (("--merge",), ("--temperature", "0.5", "--base_url", "http://127.0.0.1:9/v1", "--attempts", "1")):
        with pytest.raises(ValueError, match="3 of 3 requests have no reply yet.*nothing is written"):
            instruct(tmp_path, contexts, *flags)
        assert json.loads((tmp_path / "out" / "instruct.json").read_text()) == made, flags


@pytest.mark.slow
def test_two_processes_on_one_output_are_refused(serve, tmp_path):
    url, _ = serve(seconds=1.0)
    contexts = write_contexts(tmp_path / "c.jsonl", 2)
    process = start_script(tmp_path, "generate_data.py", "instruct", "--captions", contexts, "--out", tmp_path / "out",
                           "--base_url", url, "--workers", 1)
    while not (tmp_path / "out" / "raw.jsonl").exists():
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another process is writing there"):
        instruct(tmp_path, contexts, "--base_url", url)
    process.join()


@pytest.mark.slow
def test_shards_merge_into_what_one_machine_makes(tmp_path):
    """--shard i/n asks for a part each; --merge writes the same instruct.json, and says so if a shard is missing."""
    toy.main(["world", "--out", str(tmp_path / "world"), "--pictures", "30", "--questions", "120"])
    notes = tmp_path / "world" / "annotations"
    flags = ("--instances", notes / "instances_train.json", "--teacher", "script")
    whole = instruct(tmp_path, notes / "captions_train.json", *flags, out="whole")
    assert len(whole) == 30
    shard = lambda i: gd.main(["instruct", "--captions", str(notes / "captions_train.json"), "--out", str(tmp_path / "parts"),
                               *map(str, flags), "--shard", f"{i}/3"])
    shard(0)
    shard(1)
    with pytest.raises(ValueError, match="10 of 30 requests have no reply"):
        instruct(tmp_path, notes / "captions_train.json", *flags, "--merge", out="parts")
    shard(2)
    assert instruct(tmp_path, notes / "captions_train.json", *flags, "--merge", out="parts") == whole
    metadata = json.loads((tmp_path / "parts" / "metadata.json").read_text())
    assert "no language model" in metadata["teacher"] and metadata["requests"] == 30
    assert data.main(["check", str(tmp_path / "parts" / "instruct.json"), "--images", str(tmp_path / "world" / "images")]) == 0
    with pytest.raises(ValueError, match="--shard 3/3"):
        gd.shard_of("3/3")


def test_it_starts_without_torch():
    """A thousand pictures are asked about in the time that loading torch and transformers takes."""
    code = "import sys, generate_data; sys.exit([m for m in ('torch', 'transformers') if m in sys.modules] or 0)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "generate_data.py loads what it does not use"


def test_show_and_estimate_send_nothing(tmp_path, capsys):
    contexts = write_contexts(tmp_path / "c.jsonl", 158)
    flags = ["instruct", "--captions", str(contexts), "--out", str(tmp_path / "out"), "--base_url", "http://127.0.0.1:9/v1"]
    gd.main([*flags, "--show", "2"])
    said = capsys.readouterr().out
    assert said.count("[system]") == 2 and said.count("---") >= 2 and "number" in said
    gd.main([*flags, "--estimate", "--price_in", "30", "--price_out", "60", "--rpm", "1"])
    said = capsys.readouterr().out.splitlines()
    total = said[-3].replace(",", "").split()
    assert total[:2] == ["all", "158"]
    assert float(total[4]) == pytest.approx((int(total[2]) * 30 + int(total[3]) * 60) / 1e6, abs=0.01)
    assert "2.6 hours" in said[-2] and not (tmp_path / "out").exists()


def test_a_bench_is_shown_and_estimated_before_anything_is_sent(tmp_path, capsys):
    contexts = write_contexts(tmp_path / "c.jsonl", 9)
    flags = ["instruct", "--captions", str(contexts), "--out", str(tmp_path / "b"), "--base_url", "http://127.0.0.1:9/v1"]
    gd.main([*flags, "--bench", "5", "--show", "4"])
    said = capsys.readouterr().out
    assert said.count("[system]") == 4 and said.count("-reference-") == 1
    gd.main([*flags, "--bench", "5", "--estimate"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["reference", "15"] in [row[:2] for row in rows] and ["all", "30"] in [row[:2] for row in rows]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("flags, says", [
    ("--bench 10", "--bench 10.*9 pictures"), ("--bench -1", "--bench -1.*0 or more"),
    ("--bench 2 --limit 3", "no use for --limit"), ("--bench 2 --numbers conversation=1 --merge", "use for --numbers, --merge"),
    ("--attempts 0", "--attempts 0.*1 or more"), ("--workers 0", "--workers 0"), ("--limit 0", "--limit 0"),
    ("--show -1", "--show -1"), ("--rpm -1", "--rpm -1.0"), ("--tpm inf", "--tpm inf"), ("--tpm 100", "--tpm 100.*tokens"),
    ("--timeout 0", "--timeout 0.0"), ("--temperature nan", "--temperature nan"), ("--max_tokens 0", "--max_tokens 0"),
    ("--price_in -1", "--price_in -1.0"), ("--numbers conversation=1.5", "--numbers conversation=1.5.*whole"),
    ("--mix conversation=1 conversation=2", "each TYPE once"), ("--numbers conversation=1 --shard 1/2", "--shard 1/2"),
    ("--numbers conversation=1 --mix conversation=1", "--numbers and --mix"), ("--teacher script", "shapes finds no boxes"),
    ("--extra [1]", "--extra .1.*JSON object"), ("--extra {", "JSON object")])
def test_a_flag_that_cannot_be_meant_is_an_error_that_names_it(tmp_path, flags, says):
    with pytest.raises(ValueError, match=says):
        instruct(tmp_path, write_contexts(tmp_path / "c.jsonl", 9), "--base_url", "http://127.0.0.1:9/v1", *flags.split())


def test_no_traceback_for_a_file_in_the_way_or_a_reader_that_leaves(tmp_path):
    contexts = write_contexts(tmp_path / "c.jsonl", 9)
    command = f"{sys.executable} {ROOT}/generate_data.py instruct --captions {contexts} --out {contexts}"
    shown, refused = (subprocess.run(["bash", "-c", command + more], capture_output=True, text=True)
                      for more in (" --show 9 | head -1", ""))
    assert shown.stdout.startswith("---") and not shown.stderr, shown.stderr
    assert refused.stderr == f"error: [Errno 17] File exists: '{contexts}'\n"


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        gd.main(["instruct", "-h"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: https://api.openai.com/v1)" in said and "(default: 8)" in said and "(default: None)" not in said


def test_language_is_asked_for_and_checked(serve, tmp_path, capsys):
    url, _ = serve(text="问题：\n这是什么？\n===\n回答：\n这是一辆公共汽车。")
    contexts = write_contexts(tmp_path / "c.jsonl", 1)
    flags = ("--base_url", url, "--mix", "conversation=1")
    assert len(instruct(tmp_path, contexts, *flags, "--language", "Chinese")) == 1
    assert instruct(tmp_path, contexts, *flags, "--language", "German", out="german") == []
    assert "公共汽车" in (tmp_path / "german" / "rejected.jsonl").read_text(), "nobody can read what was rejected"
    gd.main(["instruct", "--captions", str(contexts), "--out", "x", "--language", "Chinese", "--show", "1"])
    assert "Write in Chinese" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Klingon: known are"):
        instruct(tmp_path, contexts, "--language", "Klingon")


def test_bench_has_a_question_of_each_type_and_its_reference(tmp_path):
    """LLaVA-Bench (COCO) in the making (Sec. 5.1)."""
    toy.main(["world", "--out", str(tmp_path / "world"), "--pictures", "12", "--questions", "120"])
    notes = tmp_path / "world" / "annotations"
    gd.main(["instruct", "--captions", str(notes / "captions_train.json"), "--instances", str(notes / "instances_train.json"),
             "--out", str(tmp_path / "b"), "--teacher", "script", "--bench", "4"])
    questions, reference, contexts = (lines(tmp_path / "b" / f"{name}.jsonl") for name in ("questions", "reference", "context"))
    assert [q["category"] for q in questions] == ["conv", "detail", "complex"] * 4 and len(contexts) == 4
    assert [r["question_id"] for r in reference] == [q["question_id"] for q in questions] == list(range(12))
    assert all(r["text"] for r in reference) and "<image>" not in str(questions)
    assert {c["image"] for c in contexts} == {q["image"] for q in questions}
    scenes = toy.read_coco(notes / "instances_train.json")
    for c in contexts:
        scene = scenes[int(c["id"])]
        assert [thing["category"] for thing in c["instances"]] == [t.name for t in scene.things]
        assert reference[3 * contexts.index(c) + 1]["text"] == toy.description(scene)


def test_bench_takes_no_question_and_no_reference_that_is_a_refusal(serve, tmp_path, capsys):
    """A candidate must not be scored beside "I'm sorry"; the next picture takes the place of one without an answer."""
    url, _ = serve(faults={"refuses": 0.15})
    gd.main(["instruct", "--captions", str(write_contexts(tmp_path / "c.jsonl", 40)), "--out", str(tmp_path / "b"),
             "--model", "m", "--base_url", url, "--bench", "6", "--workers", "1"])
    said = capsys.readouterr().out
    assert "reference-" in said and "refuses; another picture takes its place" in said, "the test's server refused no reference"
    reference, questions = lines(tmp_path / "b" / "reference.jsonl"), lines(tmp_path / "b" / "questions.jsonl")
    assert len(reference) == len(questions) == 18 and "sorry" not in str(reference) + str(questions)
    for number, (question, answer) in enumerate(zip(questions, reference)):
        assert question["question_id"] == answer["question_id"] == number and question["text"] == answer["prompt"]
        assert question["text"] in answer["text"] or question["category"] == "detail", "a reference to another question"


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1's pairs


def test_light_phrases_are_runs_of_content_words():
    said = list(gd.light_phrases(["A small dog sits on the wooden bench.", "Two people, a man's hat!", ""]))
    assert said == [{"small dog", "wooden bench"}, {"people", "man's hat"}, set()]


def test_the_concept_filter_follows_the_appendix():
    """Against a slow loop over the same rule, with phrases of 1 to 400 captions."""
    rng = random.Random(0)
    captions = [{f"c{int(rng.paretovariate(0.5))}" for _ in range(rng.randint(0, 3))} for _ in range(3000)]
    kept, before, after = gd.concept_filter(captions, most=50, least=3)
    names, where = [], {}
    for i, some in enumerate(captions):
        for phrase in sorted(some):
            if phrase not in where:
                names.append(phrase)
            where.setdefault(phrase, []).append(i)
    assert before.tolist() == [len(where[name]) for name in names]
    must = {i for ids in where.values() if 3 <= len(ids) <= 50 for i in ids}
    assert must <= set(np.flatnonzero(kept)), "a phrase of 3 to 50 captions did not add all of them"
    for name, n in zip(names, after):
        assert n == sum(kept[i] for i in where[name])
        if len(where[name]) > 50:
            assert n >= 50, "a frequent phrase must add 50"
    extra = int(kept.sum()) - len(must)
    assert 0 < extra <= 50 * sum(len(ids) > 50 for ids in where.values()), "more was kept than the rule adds"
    assert not any(kept[i] for i, some in enumerate(captions) if all(len(where[p]) < 3 for p in some))


def test_filter_and_expand_make_stage_1s_file(tmp_path):
    """TSV in CC3M's order of columns -> pairs.tsv -> LLaVA's JSON with a question of our 11 (Sec. 4.2)."""
    nouns = ["old bridge", "green field", "tall tower"]
    rows = [f"a {nouns[i % 3]} near the {nouns[(i + 1) % 3]}\t{i}.jpg" for i in range(600)] + ["an unheard thing\tx.jpg"]
    (tmp_path / "cc.tsv").write_text("\n".join(rows) + "\n")
    gd.main(["filter", "--pairs", str(tmp_path / "cc.tsv"), "--out", str(tmp_path / "f"), "--columns", "caption image",
             "--finder", "light"])
    counts = json.loads((tmp_path / "f" / "metadata.json").read_text())
    assert counts["pairs"] == 601 and 100 <= counts["kept"] <= 300
    assert counts["phrases_frequent"] == 3 == counts["phrases_covered"]
    assert (tmp_path / "f" / "coverage.png").stat().st_size > 5000
    gd.main(["expand", "--pairs", str(tmp_path / "f" / "pairs.tsv"), "--out", str(tmp_path / "chat.json")])
    records = json.loads((tmp_path / "chat.json").read_text())
    assert len(records) == counts["kept"] and {r["image"] for r in records} <= {f"{i}.jpg" for i in range(600)}
    for r in records:
        assert r["conversations"][0]["value"].replace("<image>", "").strip() in brief_instructions()
        assert r["conversations"][1]["value"] == rows[int(r["id"])].split("\t")[0] and not form_problem(r, ".")


def test_pairs_come_from_json_lines_or_a_folder_too(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"image": "a.jpg", "caption": "a  bus"}\n')
    assert list(gd.read_pairs(str(tmp_path / "p.jsonl"))) == [("a.jpg", "a bus")]
    folder = tmp_path / "pictures" / "sub"
    folder.mkdir(parents=True)
    (folder / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no b.txt"):
        list(gd.read_pairs(str(tmp_path / "pictures")))
    (folder / "b.txt").write_text("a shop\n")
    assert list(gd.read_pairs(str(tmp_path / "pictures"))) == [("sub/b.png", "a shop")]
    (tmp_path / "bad.tsv").write_text("a.jpg\tx\nno tab here\n")
    with pytest.raises(ValueError, match="bad.tsv, line 2"):
        list(gd.read_pairs(str(tmp_path / "bad.tsv")))
    (tmp_path / "url.tsv").write_text("http://x.org/a.jpg\tx\n")
    with pytest.raises(ValueError, match="download"):
        gd.main(["expand", "--pairs", str(tmp_path / "url.tsv"), "--out", str(tmp_path / "o.json")])


@pytest.mark.parametrize("row, flags, says", [
    ("a bus\thttp://x.org/1", "", "line 1.*look swapped.*--columns 'image caption'"),
    ("a bus\t1.jpg", "", "look swapped"), ("1.jpg\ta bus", "--columns caption,image", "look swapped"),
    ("1.jpg\tan <image> of a bus", "", "pair 1: <image>.*in the caption")])
def test_swapped_columns_and_bad_captions_are_errors_that_leave_nothing_behind(tmp_path, row, flags, says):
    (tmp_path / "p.tsv").write_text(row + "\n")
    flags = [word.replace(",", " ") for word in flags.split()]
    with pytest.raises(ValueError, match=says):
        gd.main(["expand", "--pairs", str(tmp_path / "p.tsv"), "--out", str(tmp_path / "o.json"), *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["p.tsv"]


@pytest.mark.parametrize("flags, says", [([], "in 3 of the 1 captions; lower --least"), (["--least", "0"], "--least 0"),
                                         (["--most", "0"], "--most 0"), (["--finder", "spacy"], "pip install spacy")])
def test_a_filter_that_would_keep_nothing_or_lacks_its_finder_says_so(tmp_path, flags, says):
    if says == "pip install spacy" and gd.find_spec("en_core_web_sm"):
        pytest.skip("spaCy is here")
    (tmp_path / "p.tsv").write_text("1.jpg\ta bus\n")
    with pytest.raises(ValueError, match=says):
        gd.main(["filter", "--pairs", str(tmp_path / "p.tsv"), "--out", str(tmp_path / "f"), *flags])
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("argv, says", [([], "no command given"), (["make"], "make is no command")])
def test_a_command_is_needed(argv, says):
    with pytest.raises(ValueError, match=f"{says}; one of instruct, filter, expand"):
        gd.main(argv)
