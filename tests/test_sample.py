"""Talking to it (Sec. 5.1): the prompt of training, one question, a chat, a file of questions, pictures from the web."""
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
import torch

import sample
import train
from conftest import byte_tokenizer, run_script, scripted_llm, start_script, tiny_clip, tiny_llava
from data import TEMPLATES, Conversations, collate, prompt
from images import load_image
from model import IGNORE, LLaVA
from records import Records, brief_instructions, image_names

QUESTION = "What is 0.0?"


def save(model, folder, template="llava_v0", stage=2):
    """A checkpoint as train.py leaves it."""
    model.tokenizer.chat_template = TEMPLATES[template].jinja()
    model.meta |= {"template": template, "stage": stage}
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose answers depend on all of its prompt, in a folder of the name of a run."""
    return save(tiny_llava(), tmp_path_factory.mktemp("sample") / "my_run")


@pytest.fixture(scope="module")
def recite(tmp_path_factory):
    """recite(": text###"): the folder of a checkpoint that answers `text` to everything."""
    def make(*texts, end=None, template="llava_v0"):
        model = LLaVA(tiny_clip(), scripted_llm(*texts, end=end), byte_tokenizer())
        return save(model, tmp_path_factory.mktemp("recite") / "model", template)
    return make


@pytest.fixture(scope="module")
def picture(chats):
    return str(chats / "images" / "0_0.tiff")


def spoken(capsys, *argv):
    """What `python sample.py ...` prints."""
    capsys.readouterr()
    sample.main([str(x) for x in argv])
    return capsys.readouterr().out


def answer(folder, text, pictures=(), new=12):
    """The reference: one prompt alone, built by hand from LLaVA's form of a question, and `generate`."""
    model = LLaVA.from_pretrained(folder)
    template = TEMPLATES[model.meta["template"]]
    turns = [{"from": "human", "value": "<image>\n" * len(pictures) + text}]
    batch = collate([prompt(turns, [load_image(p) for p in pictures], model.tokenizer, template, model.view)],
                    side="left")
    inputs = batch["input_ids"], batch["attention_mask"], batch["X_v"]
    return model.generate(*inputs, stop=[template.STOP], max_new_tokens=new)[0]


# ---------------------------------------------------------------------------------------------------------------------
# One question


@pytest.mark.parametrize("with_picture", [True, False])
def test_one_question_prints_the_models_answer(with_picture, checkpoint, picture, capsys):
    """Sec. 5.1: the command says what `model.generate` says to that prompt, and greedily it always says the same."""
    argv = ["--model", checkpoint, "--question", QUESTION, "--temperature", 0, "--max_new_tokens", 12]
    argv += ["--image", picture] if with_picture else []
    want = answer(checkpoint, QUESTION, [picture] if with_picture else [])
    assert len(want) > 3 and want != answer(checkpoint, "Who?", [picture] if with_picture else []), "the model says too little"
    assert [spoken(capsys, *argv) for _ in range(2)] == [want + "\n"] * 2, "not the model's answer, or not twice the same"
    if with_picture:
        assert want != answer(checkpoint, QUESTION), "the picture makes no difference"


def test_the_prompt_is_id_for_id_what_training_has_before_the_answer(checkpoint, picture, chats, capsys):
    """Eq. (2), Table 2: --show_prompt prints the text and the ids that `Conversations` gives up to the first scored token
    of the same conversation, and the answer is generated from them."""
    model = LLaVA.from_pretrained(checkpoint)
    data = Conversations(Records([chats / "chat.json"]), chats / "images", model.tokenizer, TEMPLATES["llava_v0"],
                         model.view, image_position="first")
    trained = data[0, 0, True]
    ids = trained["input_ids"][:next(i for i, label in enumerate(trained["labels"]) if label != IGNORE)]
    shown = spoken(capsys, "--model", checkpoint, "--image", picture, "--question", QUESTION, "--temperature", 0,
                   "--max_new_tokens", 12, "--show_prompt")
    text, shown_ids, rest = re.fullmatch(r"(.*?)\n(\[[\d, ]+\])\n(.*)\n", shown, re.DOTALL).groups()
    assert json.loads(shown_ids) == ids, "the model is asked in another form than it was trained in"
    assert text.replace("<image>", "<image>" * model.N) == model.tokenizer.decode(ids), "text and ids are not one prompt"
    want = model.generate(torch.tensor([ids]), torch.ones(1, len(ids)), trained["X_v"], stop=["###"], max_new_tokens=12)
    assert [rest] == want


def test_a_seed_repeats_what_a_temperature_makes_random(checkpoint, picture, capsys):
    """--temperature draws, and --seed is all that the draw depends on."""
    argv = ["--model", checkpoint, "--question", QUESTION, "--image", picture, "--temperature", 1, "--max_new_tokens", 12]
    one, again, other = (spoken(capsys, *argv, "--seed", seed) for seed in (1, 1, 2))
    assert one == again, "the same seed gives another answer"
    assert len({one, other, answer(checkpoint, QUESTION, [picture]) + "\n"}) == 3, "the temperature or the seed has no effect"


class Writes(io.StringIO):
    """A standard output that remembers each write."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return len(text)


@pytest.mark.parametrize("learnt, end, whole", [
    ([": cat###"], None, "cat"),
    ([":d\u00e9\u732b\U0001f600x###"], None, "d\u00e9\u732b\U0001f600x"),      # 2, 3 and 4 bytes, one id each
    ([": x#y"], "y", "x#y"),                                                   # the start of "###", but not all of it
    ([":cat ###"], None, "cat"),                                               # a blank before STOP belongs to no answer
    ([": end#"], "#", "end#"),
])
def test_streamed_pieces_are_whole_characters_of_the_answer_and_never_of_STOP(learnt, end, whole, recite, monkeypatch):
    """The answer is shown as it comes, but only what is sure: no half of a character, no beginning of STOP (Table 2), no
    blank that the finished answer does not have; joined, the pieces are the answer of `generate`."""
    folder = recite(*learnt, end=end)
    assert answer(folder, "Say it.", new=40) == whole, "the model did not learn its text: the test tests nothing"
    out = Writes()
    monkeypatch.setattr(sys, "stdout", out)
    sample.main(["--model", str(folder), "--question", "Say it.", "--temperature", "0"])
    monkeypatch.undo()
    pieces = [piece for piece in out.pieces if piece]
    assert "".join(pieces) == whole + "\n", "what was shown piece by piece is not the answer"
    assert "\ufffd" not in "".join(pieces), "half a character was shown"
    assert len(pieces) > 2, "the answer was not shown as it came"
    shown = ["".join(pieces[:n]) for n in range(len(pieces))]
    assert all(whole.startswith(part) for part in shown), f"something was shown and taken back: {shown}"


def test_an_image_tag_in_the_question_is_no_crash(checkpoint, picture, capsys):
    """Data sets write <image> into their questions. Typed here beside --image it is the same picture, or an error that
    says what to do, but no traceback and no second picture."""
    argv = ["--model", checkpoint, "--image", picture, "--temperature", 0, "--max_new_tokens", 12]
    try:
        said = spoken(capsys, *argv, "--question", f"<image>\n{QUESTION}")
    except ValueError as error:
        assert "<image>" in str(error)
    else:
        assert said == answer(checkpoint, QUESTION, [picture]) + "\n"


@pytest.mark.parametrize("argv, error", [
    (["--image", "gone.png", "--question", "?"], "gone.png"), (["--questions", "q.jsonl"], "--answers"),
    (["--question", "x" * 600], "600|context is 512")])
def test_what_cannot_be_asked_is_a_plain_error(argv, error, checkpoint):
    """What a user typed and cannot work is named in a ValueError or FileNotFoundError."""
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        sample.main(["--model", str(checkpoint), *argv])


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, parts):
    """--model takes the folder that train.py leaves; an empty folder or a language model alone is an error that says so."""
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(folder))):
            sample.main(["--model", str(folder), "--question", "?"])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(parts / "llm"))):
        sample.main(["--model", str(parts / "llm"), "--question", "?"])


def test_a_checkpoint_without_a_template_must_be_told_one(tmp_path, capsys):
    """Folders that others made do not name their template; guessing from the folder's name is no way to know it."""
    model = tiny_llava()
    model.save_pretrained(tmp_path / "llava-v1-7b")
    with pytest.raises(ValueError, match="--template.*vicuna_v1"):
        sample.main(["--model", str(tmp_path / "llava-v1-7b"), "--question", "?"])
    shown = spoken(capsys, "--model", tmp_path / "llava-v1-7b", "--question", "Why?", "--template", "vicuna_v1",
                   "--show_prompt", "--max_new_tokens", 2)
    assert "USER: Why? ASSISTANT:" in shown


# ---------------------------------------------------------------------------------------------------------------------
# A chat, in a real process


def test_a_chat_keeps_its_history_and_survives_mistakes(recite, chats, tmp_path, picture):
    """Table 2 over several turns: the second prompt is the first with its answer, STOP and the new question; /image adds
    a picture, /reset forgets both; a missing picture and an unknown command are answered and the chat goes on."""
    lines = ["What is it?", "And why?", "/image nowhere.png", "/imagine", f"/image {picture}", "Here?", "/reset", "Again?",
             "/quit", "Not asked any more."]
    code, shown = run_script(tmp_path, "sample.py", "--model", recite(": cat###"), "--image", picture, "--show_prompt",
                             "--temperature", 0, stdin="\n".join(lines))
    assert code == 0, shown
    texts = re.findall(r"(A chat between.*?)\n\[", shown, re.DOTALL)
    ids = [json.loads(found) for found in re.findall(r"^\[\d[\d, ]*\]$", shown, re.MULTILINE)]
    assert len(texts) == len(ids) == 4, f"4 questions were asked, {len(ids)} prompts were made:\n{shown}"
    assert shown.count("\ncat\n") == 4, f"4 answers are due:\n{shown}"
    head = texts[0].removesuffix("<image>\nWhat is it?###Assistant:")
    assert head.endswith("###Human: "), f"not the form of Table 2: {texts[0]}"
    assert texts[1] == texts[0] + " cat###Human: And why?###Assistant:", "the history is not in the trained form"
    assert texts[2] == texts[1] + " cat###Human: <image>\nHere?###Assistant:", "/image did not go into the next question"
    assert texts[3] == head + "Again?###Assistant:", "/reset did not forget the history"
    image_id = byte_tokenizer().convert_tokens_to_ids("<image>")
    assert [prompt_ids.count(image_id) for prompt_ids in ids] == [4, 4, 8, 0], "pictures are lost or double"
    assert ids[1][:len(ids[0])] == ids[0], "the second prompt does not begin with the first"
    assert "error: image nowhere.png: no such file" in shown and "/imagine is not one of" in shown
    assert "Traceback" not in shown and "Not asked" not in shown, "/quit does not leave"


def test_a_chat_ends_at_the_end_of_its_input(checkpoint, tmp_path):
    """Input that ends is an end, not an error; an empty line is no question."""
    code, shown = run_script(tmp_path, "sample.py", "--model", checkpoint, "--max_new_tokens", 2, stdin="\n\n")
    assert code == 0 and "assistant:" not in shown and "Traceback" not in shown, shown


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_chat(recite, tmp_path):
    """SIGINT while an answer comes ends the answer; what was said so far stays in the history."""
    model = recite(": abab")                               # a and b for ever
    process = start_script(tmp_path, "sample.py", "--model", model, "--temperature", 0, "--show_prompt", fifo=True,
                           stdin="Go on?\nWhat was that?\n/quit\n")
    with open(tmp_path / "output", buffering=1, newline="") as output:
        shown = ""
        while not shown.endswith("\nabab"):
            shown += output.read(1) or pytest.fail(f"the chat ended too early:\n{shown}")
        os.kill(process.pid, signal.SIGINT)
        shown += output.read()
    process.join(60)
    assert process.exitcode == 0, f"Ctrl-C ended the chat:\n{shown[-2000:]}"
    said = re.search(r"\n([ab]+) \(stopped\)\n", shown)
    assert said and f"###Assistant: {said[1]}###Human: What was that?" in shown, f"the interrupted answer is lost:\n{shown}"


def test_a_chat_survives_a_conversation_that_is_too_long(checkpoint, tmp_path):
    """A question beyond the model's context (512) gets an error; /reset and a short one get an answer."""
    code, shown = run_script(tmp_path, "sample.py", "--model", checkpoint, "--max_new_tokens", 2,
                             stdin=f"{'why ' * 200}\n/reset\nWhy?\n")
    assert code == 0 and "512" in shown and "Traceback" not in shown, shown
    assert shown.count("assistant: ") == 2, "the chat did not go on"


# ---------------------------------------------------------------------------------------------------------------------
# A file of questions


@pytest.fixture(scope="module")
def questions(chats, tmp_path_factory):
    """The path of 9 questions: with one picture, two, none; two questions under one id; of different lengths."""
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    asked = [{"question_id": i, "image": f"{8 * (i % 4)}_0.tiff", "text": f"What{' and what' * (i % 3)}?"} for i in range(6)]
    asked += [{"question_id": 5, "image": "8_0.tiff", "text": "Is it so?\nAnswer yes or no."},
              {"question_id": "text", "text": "Wer ist das, \u00e4h?"},
              {"question_id": "two", "image": ["4_0.tiff", "4_1.tiff"], "text": "Which?"}]
    path.write_text("".join(json.dumps(q) + "\n" for q in asked))
    return path


@pytest.fixture
def ask_file(checkpoint, questions, chats):
    """ask_file(answers, ...): answer the file in batches of 4; returns the records of the answers file."""
    def ask(answers, *more, model=checkpoint):
        sample.main([str(x) for x in ["--model", model, "--questions", questions, "--images", chats / "images", "--answers",
                                      answers, "--temperature", 0, "--max_new_tokens", 12, "--batch_size", 4, *more]])
        return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    return ask


def test_a_file_of_questions_gets_the_answers_that_each_gets_alone(ask_file, questions, chats, checkpoint, tmp_path):
    """LLaVA's answers file: its fields, in the order of the questions; left-padded batches of different lengths change
    no answer; questions without picture, with two, and two questions under one id are all answered."""
    answers = ask_file(tmp_path / "a.jsonl")
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    assert [(a["question_id"], a["prompt"]) for a in answers] == [(q["question_id"], q["text"]) for q in asked]
    for a, q in zip(answers, asked):
        assert a.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert a["model_id"] == "my_run"
        alone = answer(checkpoint, q["text"], [chats / "images" / n for n in image_names(q)])
        assert a["text"] == alone, f"question {q['question_id']} gets another answer in a batch than alone"
    assert len({a["answer_id"] for a in answers}) == 9 and len({a["text"] for a in answers}) > 4


def test_batched_answers_are_the_single_ones_token_for_token(checkpoint, questions, chats):
    """Padding on the left is masked and does not count as position: a row's ids in a batch are its ids alone."""
    talker = sample.Talker(sample.Config(model=str(checkpoint), temperature=0.0, max_new_tokens=12))
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    conversations = [([talker.ask(q["text"], len(image_names(q)))],
                      [load_image(chats / "images" / n) for n in image_names(q)]) for q in asked]

    def ids(batch):
        steps = talker.model.stream(**talker.batch(batch), stop=talker.stop, **talker.sampling)
        return [[i for i in row if i is not None] for row in zip(*steps)]
    assert ids(conversations) == [ids([one])[0] for one in conversations]


def test_an_interrupted_file_goes_on_where_it_was(ask_file, tmp_path, capsys):
    """A kill leaves some answers and a torn line; the same command completes them, and gives what an uninterrupted run
    gives (but for answer_id, which is new for what is answered anew)."""
    whole = ask_file(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_text(lines[7] + lines[2] + lines[5] + lines[0][:len(lines[0]) // 2])
    went_on = ask_file(part)
    without = lambda answers: [{k: v for k, v in a.items() if k != "answer_id"} for a in answers]
    assert without(went_on) == without(whole), "an interrupted run ends in other answers"
    kept = {a["answer_id"] for a in went_on} & {a["answer_id"] for a in whole}
    assert kept == {whole[i]["answer_id"] for i in (7, 2, 5)}, "what was answered already was asked again"
    before = part.read_text()
    ask_file(part)
    assert part.read_text() == before, "a finished file is not left as it is"


def test_another_models_answers_are_not_mixed_in(ask_file, checkpoint, questions, tmp_path):
    """An answers file of another model or of other questions is an error, and stays as it is, to the last byte."""
    other = {"question_id": 0, "prompt": "What?", "text": "x", "answer_id": "1", "model_id": "their_run", "metadata": {}}
    for record, error in ((other, "their_run.*my_run"), ({**other, "model_id": "my_run", "prompt": "Whose?"}, "does not ask"),
                          ({"question_id": 0, "tuple": [8, 9]}, "a.jsonl")):
        for ending in ("\n", ""):                          # an editor may have taken the last newline
            path = tmp_path / "a.jsonl"
            path.write_text(json.dumps(record) + ending)
            with pytest.raises(ValueError, match=error):
                ask_file(path)
            assert path.read_text() == json.dumps(record) + ending, "a file that is not ours was changed"


def test_a_bad_question_is_an_error_with_its_id_before_anything_is_asked(ask_file, chats, questions, checkpoint, tmp_path):
    """All questions are checked before the first answer: file, index, id, and what is wrong."""
    (tmp_path / "text.png").write_text("not a picture")
    shutil.copy(chats / "images" / "0_0.tiff", tmp_path)
    good = {"question_id": "good", "image": "0_0.tiff", "text": "What?"}
    for bad, error in [({"question_id": "lost", "image": "gone.png", "text": "?"}, r"q\.jsonl\[1\] \(id lost\).*gone\.png"),
                       ({"question_id": "torn", "image": "text.png", "text": "?"}, r"q\.jsonl\[1\] \(id torn\).*text\.png"),
                       ({"question_id": "out", "image": "../x.png", "text": "?"}, r"\.\./x\.png.*leaves"),
                       ({"question_id": "mute", "image": "0_0.tiff"}, r"q\.jsonl\[1\].*text"),
                       ({"text": "?"}, r"q\.jsonl\[1\].*question_id")]:
        path = tmp_path / "q.jsonl"
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad))
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            ask_file(tmp_path / "a.jsonl", "--questions", path, "--images", tmp_path)
        assert not (tmp_path / "a.jsonl").exists(), "answering began before all questions were checked"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures from the web


@pytest.fixture(scope="module")
def web(chats, tmp_path_factory):
    """The address of a real HTTP server on this machine with the pictures, and a page that is none."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copy(chats / "images" / "0_0.tiff", folder)
    (folder / "page.png").write_text("<html>Please log in</html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_picture_comes_from_an_http_address(web, checkpoint, picture, capsys, monkeypatch, tmp_path):
    """--image takes an address; what is not there or no picture is an error that names it, and a chat goes on."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    argv = ["--model", checkpoint, "--question", QUESTION, "--temperature", 0, "--max_new_tokens", 12, "--image"]
    assert spoken(capsys, *argv, f"{web}/0_0.tiff") == spoken(capsys, *argv, picture), "the picture changes on its way"
    for address, error in ((f"{web}/gone.png", "404"), (f"{web}/page.png", "not a readable picture"),
                           ("http://127.0.0.1:9/x.png", "127.0.0.1")):
        with pytest.raises(ValueError, match=f"{re.escape(address)}.*{error}"):
            sample.main([str(x) for x in [*argv, address]])
    code, shown = run_script(tmp_path, "sample.py", "--model", checkpoint, "--max_new_tokens", 2,
                             stdin=f"/image {web}/gone.png\n/image {web}/0_0.tiff\nWhat?\n")
    assert code == 0 and "404" in shown and shown.count("assistant: ") == 1 and "Traceback" not in shown, shown


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1


@pytest.mark.parametrize("question", [True, False])
def test_a_stage_1_checkpoint_is_asked_in_its_own_form(question, parts, chats, picture, tmp_path, capsys):
    """Sec. 4.2: after stage 1 only captions were ever scored, behind a brief instruction (or behind nothing, as in the
    released code). It is recognised by what the checkpoint says, told on stderr, and the prompt is one of training's."""
    path, out = tmp_path / "captions.json", tmp_path / "stage2"               # a name says nothing
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    path.write_text(json.dumps([{"image": "0_0.tiff", "conversations": turns}] * 4))
    argv = ["--data", path, "--images", chats / "images", "--vision", parts / "clip", "--llm", parts / "llm", "--out", out]
    argv += ["--template", "llava_v0", "--max_steps", 1, "--global_batch_size", 4, "--workers", 0]
    train.main([str(x) for x in [*argv, "--stage1_question" if question else "--no-stage1_question"]])
    capsys.readouterr()
    sample.main(["--model", str(out), "--image", picture, "--question", "Why?", "--show_prompt", "--max_new_tokens", "2"])
    shown = capsys.readouterr()
    assert "stage-1 checkpoint" in shown.err and "stage-1" not in shown.out, "nobody is told, or the answer is not alone"
    asked = json.loads(re.search(r"^\[[\d, ]+\]$", shown.out, re.MULTILINE)[0])
    model = LLaVA.from_pretrained(out)
    data = Conversations(Records([path]), chats / "images", model.tokenizer, TEMPLATES[model.meta["template"]],
                         model.view, questions=brief_instructions() if question else None)
    prompts = []
    for epoch in range(50):
        ids, labels, _, _ = data.encoded(0, epoch)
        prompts.append(ids[:next(i for i, label in enumerate(labels) if label != IGNORE)])
    assert asked in prompts, f"asked as in no sample of training: {model.tokenizer.decode(asked)!r}"
    if not question:
        assert set(asked) == {model.image_id}, "the plain form is the picture and nothing else"
