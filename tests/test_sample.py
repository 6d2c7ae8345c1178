"""Asking (Sec. 5.1): the prompt of training, one question, a chat, a file of questions."""
import functools
import http.server
import io
import json
import os
import re
import shutil
import signal
import sys
import threading

import pytest
from conftest import byte_tokenizer, scripted_llm, tiny_clip, tiny_llava

import data
import sample
from data import Conversations, collate, sample_of
from model import LLaVA
from parts.files import IGNORE
from parts.pictures import load_image
from parts.questions import AnswerFile
from parts.records import Records, image_names
from parts.templates import TEMPLATES
from parts.views import view_of

QUESTION = "What is 0.0?"
VIEW = view_of("crop", 28, 14)


def save_checkpoint(model, folder, template="llava_v0", stage=2):
    """A checkpoint as train.py leaves it."""
    model.meta |= {"template": template, "stage": stage, **VIEW.meta}
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose answers depend on all of its prompt, in a folder of the name of a run."""
    return save_checkpoint(tiny_llava(), tmp_path_factory.mktemp("sample") / "my_run")


@pytest.fixture(scope="module")
def recite(tmp_path_factory):
    """recite(": text###"): the folder of a checkpoint that answers `text` to everything."""
    def make(*texts, end=None):
        model = LLaVA(tiny_clip(), scripted_llm(*texts, end=end), byte_tokenizer())
        return save_checkpoint(model, tmp_path_factory.mktemp("recite") / "model")
    return make


@pytest.fixture(scope="module")
def picture(chats):
    return str(chats / "images" / "0_0.tiff")


def printed(capsys, *argv):
    """What `python sample.py ...` prints."""
    capsys.readouterr()
    sample.main([str(word) for word in argv])
    return capsys.readouterr().out


def answer_of(folder, text, pictures=(), max_new_tokens=12):
    """The reference: one prompt alone, built by hand in LLaVA's form, and model.generate."""
    model = LLaVA.from_pretrained(folder)
    template = TEMPLATES[model.meta["template"]]
    turns = [{"from": "human", "value": "<image>\n" * len(pictures) + text}]
    pictures = [(str(path), load_image(path)) for path in pictures]
    batch = collate([sample_of(turns, pictures, model.tokenizer, template, VIEW)], VIEW)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "X_v", "visual_index")}
    answer, = model.generate(**inputs, stop=[template.STOP], max_new_tokens=max_new_tokens)
    return answer


# -----------------------------------------------------------------------------
# One question


def test_one_question_prints_the_models_answer(checkpoint, picture, capsys):
    """Sec. 5.1: the command says what model.generate says, and greedily always the same."""
    argv = ["--model", checkpoint, "--question", QUESTION, "--temperature", 0,
            "--max_new_tokens", 12]
    blind, seeing = answer_of(checkpoint, QUESTION), answer_of(checkpoint, QUESTION, [picture])
    assert len(blind) > 3 and blind != seeing, "the picture makes no difference"
    assert printed(capsys, *argv) == blind + "\n"
    assert [printed(capsys, *argv, "--image", picture) for _ in range(2)] == [seeing + "\n"] * 2


def test_the_prompt_is_that_of_training_id_for_id(checkpoint, picture, chats, capsys):
    """Eq. (2), Table 2: --show_prompt prints what Conversations gives up to the first scored id."""
    model = LLaVA.from_pretrained(checkpoint)
    data = Conversations(Records([chats / "chat.json"]), chats / "images", model.tokenizer,
                         TEMPLATES["llava_v0"], VIEW, image_position="first")
    trained = data.sample(0)
    n = next(i for i, label in enumerate(trained["labels"]) if label != IGNORE)
    shown = printed(capsys, "--model", checkpoint, "--image", picture, "--question", QUESTION,
                    "--temperature", 0, "--max_new_tokens", 12, "--show_prompt")
    text, ids, answer = re.fullmatch(r"(.*?)\n(\[[\d, ]+\])\n(.*)\n", shown, re.DOTALL).groups()
    assert json.loads(ids) == trained["input_ids"][:n], "asked in another form than trained"
    assert text.replace("<image>", "<image>" * VIEW.N) == model.tokenizer.decode(json.loads(ids))
    assert answer == answer_of(checkpoint, QUESTION, [picture])


def test_a_seed_repeats_what_a_temperature_makes_random(checkpoint, picture, capsys):
    """--temperature draws, and --seed is all that the draw depends on."""
    argv = ["--model", checkpoint, "--question", QUESTION, "--image", picture, "--temperature", 1,
            "--max_new_tokens", 12, "--seed"]
    one, again, other = (printed(capsys, *argv, seed) for seed in (1, 1, 2))
    greedy = answer_of(checkpoint, QUESTION, [picture]) + "\n"
    assert one == again, "the same seed gives another answer"
    assert len({one, other, greedy}) == 3, "the temperature or the seed has no effect"


@pytest.mark.parametrize("learnt, end, expected", [
    (": cat###", None, "cat"),
    (":d\u00e9\u732b\U0001f600x###", None, "d\u00e9\u732b\U0001f600x"),   # 2, 3 and 4 bytes
    (": x#y", "y", "x#y"),                                   # the start of "###", but not all of it
    (":cat ###", None, "cat"),                               # a blank before STOP is of no answer
    (": end#", "#", "end#"),
])
def test_what_is_shown_as_it_comes_is_never_taken_back(learnt, end, expected, recite):
    """No half of a character, no beginning of STOP (Table 2), no blank that is not to stay."""
    folder = recite(learnt, end=end)
    assert answer_of(folder, "Say it.", max_new_tokens=40) == expected, "it did not learn its text"
    talker = sample.Talker(sample.Config(str(folder), temperature=0.0))
    pieces = list(talker.stream([sample.human_turn("Say it.")], []))
    assert "".join(pieces) == expected and "\ufffd" not in "".join(pieces)
    assert len(pieces) > 1, "the answer was not shown as it came"


def test_what_cannot_be_asked_is_a_plain_error(checkpoint, parts, picture, tmp_path):
    """What a user typed and cannot work is named."""
    for argv, error in (
            (["--image", "gone.png", "--question", "?"], "gone.png"),
            (["--questions", "q.jsonl"], "--answers"),
            (["--questions", "q.jsonl", "--answers", "a.jsonl", "--question", "?"], "alone"),
            (["--temperature", "-1"], "--temperature"),
            (["--image", picture, "--question", "<image>\nWhy?"], "2 <image> tags for 1 picture"),
            (["--question", "x" * 600], "context is 512")):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            sample.main(["--model", str(checkpoint), *argv])
    for folder in (tmp_path, tmp_path / "gone", parts / "llm"):      # no checkpoint
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(folder))):
            sample.main(["--model", str(folder), "--question", "?"])


def test_a_checkpoint_without_a_template_must_be_told_one(tmp_path, capsys):
    """Folders of others do not name their template; guessing from their name is no way."""
    folder = tmp_path / "llava-v1-7b"
    tiny_llava().save_pretrained(folder)
    for main, argv in ((sample.main, ["--question", "?"]), (data.main, ["check", "chat.json"])):
        with pytest.raises(ValueError, match="--template.*vicuna_v1"):
            main([*argv, "--model", str(folder)])
    shown = printed(capsys, "--model", folder, "--question", "Why?", "--template", "vicuna_v1",
                    "--show_prompt", "--max_new_tokens", 2)
    assert "USER: Why? ASSISTANT:" in shown


# -----------------------------------------------------------------------------
# A chat


def test_a_chat_keeps_its_history_and_survives_mistakes(recite, picture, monkeypatch, capsys):
    """Table 2 over several turns, pictures that come later, /reset, and what is typed wrongly."""
    lines = ["What is it?", "And why?", "/image nowhere.png", "/imagine", f"/image {picture}",
             "Here?", "/reset", "why " * 200, "Again?", "/quit", "Not asked any more."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    shown = printed(capsys, "--model", recite(": cat###"), "--show_prompt", "--image", picture,
                    "--temperature", 0)
    assert shown.count("\ncat\n") == 4, f"4 answers are due:\n{shown}"
    texts = re.findall(r"(A chat between.*?)\n\[", shown, re.DOTALL)
    ids = [json.loads(found) for found in re.findall(r"^\[\d[\d, ]*\]$", shown, re.MULTILINE)]
    head = texts[0].removesuffix("<image>\nWhat is it?###Assistant:")
    assert head.endswith("###Human: "), f"not the form of Table 2: {texts[0]}"
    assert texts[1] == texts[0] + " cat###Human: And why?###Assistant:"
    assert texts[2] == texts[1] + " cat###Human: <image>\nHere?###Assistant:"
    assert texts[4] == head + "Again?###Assistant:", "/reset did not forget the history"
    image_id = byte_tokenizer().convert_tokens_to_ids("<image>")
    assert [row.count(image_id) for row in ids] == [4, 4, 8, 0, 0], "pictures are lost or double"
    assert ids[1][:len(ids[0])] == ids[0], "the second prompt does not begin with the first"
    for told in ("No such file or directory: 'nowhere.png'", "/imagine is not one of",
                 "context is 512"):
        assert told in shown
    assert "Not asked" not in shown, "/quit does not leave"


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_chat(recite, monkeypatch, capsys):
    """SIGINT while the model computes ends the answer; what was said so far stays in the history.
    Input's end is /quit."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Go on?\nWhat was that?\n"))
    choose_ids = LLaVA.choose_ids
    calls = iter(range(10 ** 6))

    def pressed(*args, **sampling):      # for the fifth word, once
        if next(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return choose_ids(*args, **sampling)
    monkeypatch.setattr(LLaVA, "choose_ids", pressed)
    try:
        shown = printed(capsys, "--model", recite(": abab"), "--temperature", 0, "--show_prompt")
    except KeyboardInterrupt:            # would end pytest, too
        pytest.fail("Ctrl-C ended the chat")
    said = re.search(r"\n([ab]+) \(stopped\)\n", shown)      # a and b for ever, but for Ctrl-C
    assert said and f"###Assistant: {said[1]}###Human: What was that?" in shown, shown


# -----------------------------------------------------------------------------
# A file of questions


@pytest.fixture(scope="module")
def questions(chats, tmp_path_factory):
    """9 questions: with one picture, two, none; two under one id; of different lengths."""
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    records = [{"question_id": i, "image": f"{8 * (i % 4)}_0.tiff",
                "text": f"What{' and what' * (i % 3)}?"} for i in range(6)]
    records += [
        {"question_id": 5, "image": "8_0.tiff", "text": "Is it so?\nAnswer yes or no."},
        {"question_id": "text", "text": "Wer ist das, \u00e4h?"},
        {"question_id": "two", "image": ["4_0.tiff", "4_1.tiff"], "text": "Which?"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def ask_file(checkpoint, questions, chats):
    """ask_file(answers, ...): answer the file in batches of 4; the records of the answers file."""
    def ask(answers, *more):
        argv = ["--model", checkpoint, "--questions", questions, "--images", chats / "images",
                "--answers", answers, "--temperature", 0, "--max_new_tokens", 12,
                "--batch_size", 4, *more]
        sample.main([str(word) for word in argv])
        return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    return ask


def test_questions_of_a_file_are_answered_as_each_alone(ask_file, questions, chats, checkpoint,
                                                        tmp_path):
    """LLaVA's answers file, in the questions' order; a batch changes no answer."""
    answers = ask_file(tmp_path / "a.jsonl")
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    assert [(a["question_id"], a["prompt"]) for a in answers] == \
        [(q["question_id"], q["text"]) for q in records]
    for a, q in zip(answers, records, strict=True):
        assert a.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert a["model_id"] == "my_run"
        alone = answer_of(checkpoint, q["text"], [chats / "images" / n for n in image_names(q)])
        assert a["text"] == alone, f"question {q['question_id']} gets another answer than alone"
    assert len({a["answer_id"] for a in answers}) == 9 and len({a["text"] for a in answers}) > 4


def test_an_interrupted_file_goes_on_where_it_was(ask_file, tmp_path):
    """A kill leaves some answers and a torn line; the same command completes them."""
    complete = ask_file(tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_text(lines[7] + lines[2] + lines[5] + lines[0][:len(lines[0]) // 2])
    resumed = ask_file(part)
    assert [a["text"] for a in resumed] == [a["text"] for a in complete]
    kept = {a["answer_id"] for a in resumed} & {a["answer_id"] for a in complete}
    assert kept == {complete[i]["answer_id"] for i in (7, 2, 5)}, "an answer was asked for again"
    before = part.read_text()
    ask_file(part)
    assert part.read_text() == before, "a finished file is not left as it is"


def test_a_file_that_is_not_ours_stays_as_it_is(ask_file, tmp_path):
    """Another model's answers, other questions', or something else: an error, and not one byte."""
    other = {"question_id": 0, "prompt": "What?", "text": "x", "answer_id": "1", "metadata": {},
             "model_id": "their_run"}
    for record, error in ((other, "their_run.*my_run|no answer"),
                          ({**other, "model_id": "my_run", "prompt": "Whose?"}, "ask|no answer"),
                          ({"question_id": 0, "tuple": [8, 9]}, "a.jsonl")):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(record))              # an editor may have taken the newline
        with pytest.raises(ValueError, match=error):
            ask_file(path)
        assert path.read_text() == json.dumps(record), "somebody's file was changed"


@pytest.mark.parametrize("bad, error", [
    ({"question_id": "lost", "image": "gone.png", "text": "?"}, r"\(id lost\).*gone\.png"),
    ({"question_id": "torn", "image": "text.png", "text": "?"}, r"\(id torn\).*text\.png"),
    ({"question_id": "out", "image": "../x.png", "text": "?"}, r"\.\./x\.png.*leaves"),
    ({"question_id": "mute", "image": "0_0.tiff"}, "text"),
    ({"question_id": "clip", "video": "a.mp4", "text": "?"}, r"\(id clip\).*'video' is not read"),
    ({"text": "?"}, "question_id, a whole number"), (7, "7 where an object belongs"),
    ({"question_id": [1], "text": "?"}, "question_id, a whole number"),
    ({"question_id": 1, "text": None}, "id 1.: text: None where text belongs"),
    ({"question_id": 1, "text": "?", "image": 5}, "id 1.: image is 5"),
    ({"question_id": 1, "text": "?", "image": [5]}, r"id 1.: image is \[5\]")])
def test_a_bad_question_is_named_before_any_is_asked(bad, error, chats, tmp_path):
    """File, index, id, and what is wrong with it."""
    (tmp_path / "text.png").write_text("not a picture")
    shutil.copy(chats / "images" / "0_0.tiff", tmp_path)
    good = {"question_id": "good", "image": "0_0.tiff", "text": "What?"}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad))
    with pytest.raises(ValueError, match=r"q\.jsonl\[1\].*" + error):
        AnswerFile(path, tmp_path, tmp_path / "a.jsonl", "my_run")
    assert not (tmp_path / "a.jsonl").exists(), "answering began before all were checked"


# -----------------------------------------------------------------------------
# Pictures from the web, checkpoints of stage 1


def test_a_picture_comes_from_an_http_address(checkpoint, picture, capsys, monkeypatch):
    """--image takes an address; what is not there is an error that names it."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler,
                                directory=os.path.dirname(picture))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    web = f"http://127.0.0.1:{server.server_port}"
    argv = ["--model", checkpoint, "--question", QUESTION, "--temperature", 0,
            "--max_new_tokens", 12, "--image"]
    assert printed(capsys, *argv, f"{web}/0_0.tiff") == printed(capsys, *argv, picture)
    with pytest.raises(ValueError, match=f"{web}/gone.png.*404"):
        printed(capsys, *argv, f"{web}/gone.png")
    server.shutdown()


def test_a_stage_1_checkpoint_is_asked_what_was_typed(picture, tmp_path, capsys):
    """"No instruction tuning" (Table 4) is that model's answer to the same questions."""
    folder = save_checkpoint(tiny_llava(), tmp_path / "stage1", "llava_v0", stage=1)
    sample.main(["--model", str(folder), "--image", picture, "--question", "Why?", "--show_prompt",
                 "--max_new_tokens", "2"])
    assert "Why?" in capsys.readouterr().out, "the question was replaced"


def test_the_plain_template_says_that_it_asks_nothing(picture, tmp_path, capsys):
    """LLaVA-1.5's stage 1 reads pictures alone: no answer of it is an answer to a question."""
    folder = str(save_checkpoint(tiny_llava(), tmp_path / "stage1", "plain", stage=1))
    sample.main(["--model", folder, "--image", picture, "--question", "Why?", "--show_prompt",
                 "--max_new_tokens", "2"])
    shown = capsys.readouterr()
    assert "Why?" not in shown.out and "pictures alone" in shown.err
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Why?"}\n')
    argv = ["--model", folder, "--questions", f"{tmp_path}/q.jsonl"]
    with pytest.raises(ValueError, match="plain, has no place for a question"):
        sample.main([*argv, "--answers", f"{tmp_path}/a.jsonl"])
    sample.main([*argv, "--answers", f"{tmp_path}/a.jsonl", "--template", "vicuna_v1",
                 "--max_new_tokens", "2"])
    assert (tmp_path / "a.jsonl").read_text().count("Why?") == 1
