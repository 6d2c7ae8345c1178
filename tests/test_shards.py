"""Data as people hold it: messages, data: URLs, Parquet, tars, and folders of them."""
import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, chat, lines, write_tar
from PIL import Image

import data as data_module
import train
from data import Conversations, collate
from parts.check import inspect_data
from parts.records import Records
from parts.shards import Place, shards_of
from parts.templates import TEMPLATES
from parts.views import view_of

ROLES = {"human": "user", "gpt": "assistant"}


# -----------------------------------------------------------------------------
# LLaVA's records in every other form


def names_of(record):
    names = record.get("image", [])
    return [names] if isinstance(names, str) else names


def messages_of(record, part_of=None):
    """The turns as messages; with `part_of`, in parts, of which each picture's is part_of(name)."""
    messages, names = [], iter(names_of(record))
    for turn in record["conversations"]:
        content = turn["value"]
        if part_of:
            content = [{"type": "text", "text": content.replace("<image>\n", "")}]
            images = [part_of(next(names)) for _ in range(turn["value"].count("<image>"))]
            content = images + content
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


def picture_rows(record, images):
    return [{"bytes": (images / name).read_bytes(), "path": name} for name in names_of(record)]


def data_url(images):
    def part(name):
        payload = base64.b64encode((images / name).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}}
    return part


def write_jsonl(rows, path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_parquet(rows, path, **options):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path, **options)
    return path


def messages_and_images(records, images, folder):
    rows = [{"messages": messages_of(r, lambda _: {"type": "image"}), "images": names_of(r)}
            for r in records]
    return write_jsonl(rows, folder / "messages.jsonl")


def tags_in_messages(records, images, folder):
    rows = [{"messages": messages_of(r), "images": names_of(r)} for r in records]
    (folder / "tags.json").write_text(json.dumps(rows))
    return folder / "tags.json"


def openai(records, images, folder):
    rows = [{"messages": messages_of(r, data_url(images)), "note": "Bücher"} for r in records]
    return write_jsonl(rows, folder / "openai.jsonl")


def array_of_urls(records, images, folder):
    url = data_url(images)
    rows = [r | {"note": "Bücher\n", "image": [url(n)["image_url"]["url"] for n in names_of(r)]}
            for r in records]
    (folder / "urls.json").write_text("\ufeff" + json.dumps(rows, indent=2, ensure_ascii=False))
    return folder / "urls.json"


def parquet_of_conversations(records, images, folder):
    rows = [{"id": i, "conversations": r["conversations"], "image": picture_rows(r, images)}
            for i, r in enumerate(records)]
    return write_parquet(rows, folder / "rows.parquet", row_group_size=7)


def parquet_of_bytes_and_messages(records, images, folder):
    rows = [{"images": [picture["bytes"] for picture in picture_rows(r, images)],
             "messages": messages_of(r, lambda _: {"type": "image"})} for r in records]
    return write_parquet(rows, folder / "bytes.parquet")


def folder_of_parquet(records, images, folder):
    (folder / "hub").mkdir()
    rows = [{"images": picture_rows(r, images), "messages": messages_of(r)} for r in records]
    for n, part in enumerate((rows[:10], rows[10:])):
        write_parquet(part, folder / "hub" / f"train-0000{n}-of-00002.parquet", compression="zstd")
    return folder / "hub"


def webdataset(records, images, folder):
    members = []
    for i, record in enumerate(records):
        key, names = f"shard/{i:04}", names_of(record)
        members.append((f"{key}.json", json.dumps(record).encode()))
        for n, name in reversed(list(enumerate(names))):          # in any order
            number = f".{n}" if len(names) > 1 else ""
            content = (images / name).read_bytes()
            members.append((f"{key}{number}.{name.partition('.')[2]}", content))
    return write_tar(folder / "shard.tar", members)


FORMS = [messages_and_images, tags_in_messages, openai, array_of_urls, parquet_of_conversations,
         parquet_of_bytes_and_messages, folder_of_parquet, webdataset]


@pytest.fixture(params=FORMS)
def form(request, chats, tmp_path):
    """The path of the records of `chats` in a form."""
    records = json.loads((chats / "chat.json").read_text())
    return request.param(records, chats / "images", tmp_path)


def open_records(source, images=None, template="vicuna_v1"):
    return Conversations(Records([source]), images, byte_tokenizer(), TEMPLATES[template],
                         view_of("anyres", 28, 14))


def test_a_sample_is_the_same_in_every_form(form, chats):
    """Ids, labels and pixels, also of several pictures; the check finds nothing wrong."""
    reference = open_records(chats / "chat.json", chats / "images")
    data = open_records(form, chats / "images")
    problems, table = inspect_data(data)
    assert not problems and np.array_equal(table, inspect_data(reference)[1])
    for i in range(len(data)):
        got, want = (collate([d.sample(i)], d.view) for d in (data, reference))
        for key in ("input_ids", "labels", "X_v", "visual_index"):
            assert torch.equal(got[key], want[key]), f"{form}: {key} of sample {i}"


@pytest.mark.parametrize("form", [folder_of_parquet, webdataset], indirect=True)
def test_a_run_on_shards_has_the_losses_of_the_json(form, parts, chats, tmp_path):
    """From the command line, with a process that decodes, and a validation."""
    logs = []
    for source, out in ((chats / "chat.json", tmp_path / "json"), (form, tmp_path / "shards")):
        argv = ["--data", source, "--images", chats / "images", "--vision", parts / "clip",
                "--llm", parts / "llm", "--template", "llava_v0", "--global_batch_size", 4,
                "--val_samples", 3, "--workers", 1, "--max_steps", 2, "--out", out]
        assert train.main([str(word) for word in argv]) == 0
        logs.append([(r["step"], r.get("loss"), r.get("val_loss"))
                     for r in lines(out / "log.jsonl")])
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_forms_mix_and_each_is_drawn_by_share(chats, tmp_path):
    """--data a.jsonl=0.5 shard.tar chat.json=7: counts, names, and a resume's checksum."""
    records = json.loads((chats / "chat.json").read_text())
    lines_, tar = (write(records, chats / "images", tmp_path) for write in (openai, webdataset))
    mixed = Records([f"{lines_}=0.5", tar, f"{chats / 'chat.json'}=7"])
    assert mixed.counts == [20, 41, 7] and mixed.totals == [41, 41, 41]
    assert re.fullmatch(r"openai.jsonl\[\d+\]", mixed.where(0))
    assert mixed.where(20) == "shard.tar[0] (id chat_0)"
    assert mixed.checksum == Records([f"{lines_}=0.5", tar, f"{chats / 'chat.json'}=7"]).checksum
    assert mixed.checksum != Records([f"{lines_}=0.5", tar, f"{chats / 'chat.json'}=8"]).checksum


def test_captions_beside_pictures_in_a_tar_are_stage_1(tmp_path):
    """As img2dataset leaves them: .jpg, .txt, and a .json of facts; what macOS adds is no sample"""
    picture = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(picture, "JPEG")
    members = [("0.jpg", picture.getvalue()), ("0.txt", b"Ein rotes Bild."),
               ("0.json", b'{"width": 20, "caption": "Ein rotes Bild."}'), ("._0.jpg", b"\0")]
    data = open_records(write_tar(tmp_path / "a.tar", members))
    assert len(data) == 1 and not inspect_data(data)[0]
    assert [turn["value"] for turn in data.records[0]["conversations"]] == ["<image>",
                                                                           "Ein rotes Bild."]
    assert data.pictures(0)[0][1].size == (20, 30)


# -----------------------------------------------------------------------------
# What is wrong


def problem_of(record, template="qwen_1_5", tmp_path=None):
    path = write_jsonl([record], tmp_path / "x.jsonl")
    problems = inspect_data(open_records(path, tmp_path, template))[0]
    return problems.get(0, "")


def ask(content, *rest, **more):
    answer = {"role": "assistant", "content": "A cat."}
    return {"messages": [*rest, {"role": "user", "content": content}, answer], **more}


TURNS = chat("<image>\nWhat?", "A cat.")
TEXT, PICTURE = {"type": "text", "text": "What?"}, {"type": "image"}


@pytest.mark.parametrize("record, says", [
    (ask("What?", images=["1.jpg"]), "0 <image> tags for 1 image"),
    (ask([PICTURE, TEXT]), "1 <image> tags for 0 images"),
    (ask([TEXT, {"type": "video", "video": "a.mp4"}]), "message 0: a part is {'type': 'video'"),
    (ask([TEXT, {"type": "input_audio"}]), "text, image and image_url are read"),
    (ask([PICTURE, {"type": "image", "image": "2.jpg"}, TEXT], images=["1.jpg"]),
     "some pictures stand in the messages and some do not"),
    (ask([{"type": "image", "index": 1}, TEXT], images=["1.jpg"]), "picture 1 where picture 0"),
    (ask([{"type": "image_url", "image_url": {"url": "http://x.org/a.jpg"}}, TEXT]),
     "'http://x.org/a.jpg' is an address; download it"),
    (ask([{"type": "image", "image": {"bytes": 7}}, TEXT]), "a picture is {'bytes': 7}"),
    (ask([{"type": "image", "url": "data:image/png;base64,!!"}, TEXT]), "not a readable picture"),
    (ask([{"type": "image", "url": "data:image/png,abc"}, TEXT]), "not a readable picture"),
    (ask(None), "message 0: content is None"), (ask("") | {"messages": {}}, "no conversations"),
    (ask("What?") | {"messages": ["a"]}, "message 0 is not {role, content}"),
    (ask("What?", {"role": "tool", "content": "5"}), "turn 0 is from 'tool'"),
    (ask("What?", {"role": "user", "content": "a", "tool_calls": [1]}), "'tool_calls'"),
    (ask("What?", {"role": "user", "content": "a"},
         {"role": "assistant", "content": "b", "weight": 0}), "message 1 has weight 0"),
    (ask("What?", tools=[{}]), "'tools' is not read"),
    (ask("What?", image_path="1.jpg"), "'image_path' is not read"),
    (ask("What?", conversations=[1]), "one of them must go"),
    (ask("What?", image="1.jpg", images=["1.jpg"]), "has 'image' and 'images'"),
    (ask("What?", {"role": "system", "content": "You are a cat."}),
     "its system message 'You are a cat.' is not that of template qwen_1_5")])
def test_what_is_wrong_with_messages_is_said(record, says, tmp_path):
    """By name, before step 0, and never as training on text alone."""
    assert says in problem_of(record, tmp_path=tmp_path)


def test_the_templates_own_system_message_is_fine(tmp_path):
    """The template writes it; without a template the check says which would refuse it."""
    record = ask("What?", {"role": "system", "content": "You are a helpful assistant."})
    assert not problem_of(record, tmp_path=tmp_path)
    assert "not that of template llama_3" in problem_of(record, "llama_3", tmp_path)


def test_a_broken_picture_inside_is_named_by_file_and_row(parts, tmp_path):
    """And left out by --skip_bad like any other."""
    url = ask([{"type": "image", "url": "data:image/png;base64,aGVsbG8="}, TEXT])
    assert "image x.jsonl:byte 0:0: not a readable picture" in problem_of(url, tmp_path=tmp_path)
    bad = {"conversations": TURNS, "image": {"bytes": b"<html>", "path": "1.jpg"}}
    gone = {"conversations": TURNS, "image": {"bytes": None, "path": "1.jpg"}}
    problems = inspect_data(open_records(write_parquet([bad, gone], tmp_path / "r.parquet")))[0]
    assert "image r.parquet:row 0:0: not a readable picture (its format is none" in problems[0]
    assert "no bytes; were the pictures embedded" in problems[1]
    tar = write_tar(tmp_path / "t.tar", [
        ("7.json", json.dumps({"conversations": TURNS}).encode()), ("7.jpg", b"\xff")])
    with pytest.raises(ValueError, match=r"t\.tar\[0\] \(id 7\): t.tar:byte 1536"):
        data_module.main(["show", str(tar), "--llm", str(parts / "llm")])


def test_a_parquet_file_without_the_columns_says_which_it_has(tmp_path):
    """Whoever saved it sees what is missing; bytes that nobody reads are named, too."""
    for row, says in (({"question": "a", "answer": "b"},
                       "no column conversations or messages; its columns are question, answer"),
                      ({"conversations": TURNS, "png": b"1"}, "column 'png' holds bytes"),
                      ({"conversations": TURNS, "image": "1.jpg", "images": ["1.jpg"]},
                       "pictures are in image or in images, not in both")):
        path = write_parquet([row], tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=f"x.parquet: {says}"):
            Records([path])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="x.parquet: not a complete Parquet file"):
        Records([path])


def test_a_damaged_or_packed_tar_and_a_name_that_stands_twice_are_named(tmp_path):
    """A download that was cut must not become a smaller data set."""
    tar, chats = tmp_path / "x.tar", json.dumps({"conversations": TURNS}).encode()
    members = [(f"{i}.json", json.dumps({"conversations": [], "note": "a" * 900}).encode())
               for i in range(9)]
    whole = write_tar(tar, members).read_bytes()
    for content, says in ((whole[:3000], "not a complete, uncompressed tar"),
                          (whole[:4608] + b"\1" * 512 + whole[5120:], "damaged at byte 4608")):
        tar.write_bytes(content)
        with pytest.raises(ValueError, match=f"x.tar: .*{says}"):
            Records([tar])
    for members, says in (([("1.json", b"{}")] * 2, "1.json is in it twice"),
                          ([("1.json", b"{")], "x.tar: 1.json: .*line 1")):
        with pytest.raises(ValueError, match=says):
            Records([write_tar(tar, members)])
    clip = Records([write_tar(tar, [("1.json", chats), ("1.mp4", b"")])])
    assert "'mp4' is not read" in clip.problem(0, clip[0], None)


def test_a_folder_holds_shards_of_one_split(tmp_path):
    """Nobody trains on a test set because it lies beside the rest."""
    with pytest.raises(ValueError, match="no .parquet and no .tar file"):
        shards_of(tmp_path)
    for name in ("train-0.parquet", "train-1.parquet", "README.md"):
        (tmp_path / name).touch()
    assert shards_of(tmp_path) == [str(tmp_path / f"train-{i}.parquet") for i in range(2)]
    (tmp_path / "test-0.parquet").touch()
    with pytest.raises(ValueError, match=r"several splits, test, train; .*/train\*"):
        shards_of(tmp_path)


def test_no_record_can_name_a_picture_in_another_file(tmp_path):
    """A Place is ours to make: what looks like one in JSON is no picture's name."""
    record = {"conversations": TURNS, "image": [list(Place("/etc/passwd", 0, 9))]}
    assert "neither a file name nor" in problem_of(record, tmp_path=tmp_path)
