"""What lies on disk and what is typed: read strictly, written at once, errors name the place."""
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from conftest import ROOT, chat

from parts import files
from parts.records import Records, normal_record

TURNS = chat("<image>\nWhat is it?", "A bus.")
RECORD = {"id": "7", "image": "7.jpg", "conversations": TURNS}


# --------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("text, records", [
    ("", []), ("[]", []), (' [ {"a": 1} , {"a": "]"}\n]\n', [{"a": 1}, {"a": "]"}]),
    ('{"a": 1}\n\n{"a": "é"}\n', [{"a": 1}, {"a": "é"}]), ('\ufeff[{"a": 1}]', [{"a": 1}]),
    ('{\n "a": 1\n}', [{"a": 1}]), ('{"a": [\n1\n]}\n', [{"a": [1]}])])
def test_an_array_and_json_lines_give_the_same_records(tmp_path, text, records):
    """LLaVA's files are arrays, many others are lines; an editor may have put a mark in front."""
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert list(files.read_json(tmp_path / "x.json")) == records


@pytest.mark.parametrize("content, says", [
    (b'[{"a": 1},\n {"a" 2}]', "bad JSON at line 2, column 7: Exp"), (b"[1 2]", "line 1, column 3"),
    (b"[1,", "line 1, column 4"), (b"[1]\nx", "line 1, column 4"),
    (b'{"a": 1}\n{"a"}\n', "bad JSON at line 2, column 5: Exp"),
    (b'{"a": 1}\n{"b": 1, "b": 2}\n', "line 2: the key 'b'"),
    (b"\x1f\x8b\x08", "gzip"), (b"PAR1", "Parquet"), (b"\xff\xfe[\x00", "UTF-16"),
    (b'["\xe9"]', "utf-8"), (b"[" * 9999, "recursion"),
    (b'[{"answer": 1, "answer": 2}]', "'answer' stands twice")])
def test_what_is_no_JSON_is_named_with_its_place(tmp_path, content, says):
    """Someone has to find it in a file of 200 MB, or see that it is a dump of another tool; of a
    key that stands twice one value would be lost."""
    (tmp_path / "x.json").write_bytes(content)
    place = "line" in says                               # json's own for a value
    for read, words in ((files.read_json, says), (files.read_value, "" if place else says)):
        with pytest.raises(ValueError, match=rf"x\.json: .*{words}"):
            list(read(tmp_path / "x.json"))


def test_a_value_of_another_type_is_named(tmp_path):
    """A boolean is no number, though Python says so."""
    (tmp_path / "x.json").write_text('\ufeff{"a": true}')
    assert files.read_value(tmp_path / "x.json") == {"a": True}
    with pytest.raises(ValueError, match="x.json: {'a': True} where a list belongs"):
        files.read_value(tmp_path / "x.json", list)
    assert files.typed(3, float, "n") == 3
    with pytest.raises(ValueError, match="n: True where a number belongs"):
        files.typed(True, float, "n")


def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path):
    """What a kill leaves must not stop whoever goes on; anything else that is no JSON must."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}]
    assert files.read_lines(path, repair=True) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match="log.jsonl: line 2 is not JSON"):
        files.read_lines(path)
    path.write_text('{"a": 1}\n3\n')
    with pytest.raises(ValueError, match="log.jsonl: line 2: 3 where an object belongs"):
        files.read_lines(path)
    path.write_text('{"a"')
    assert files.read_lines(path, repair=True) == files.read_lines(tmp_path / "none.jsonl") == []
    assert path.read_text() == "", "whoever appends would go on behind the torn line"


@pytest.mark.parametrize("change, says", [
    ("text", "a str where an object"), ({"conversations": []}, "no conversations"),
    ({"conversations": TURNS[:1]}, "the last question has no answer"),
    ({"conversations": TURNS[::-1]}, "turn 0 is from 'gpt' where 'human' belongs"),
    ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "turn 1 (gpt) is empty"),
    ({"conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}]}, "turn 1 (gpt) holds"),
    ({"conversations": [TURNS[0], {"from": "gpt", "value": "\ud83d"}]}, "surrogate"),
    ({"conversations": [TURNS[0], {"from": "gpt"}]}, "turn 1 is not {from, value}"),
    ({"conversations": [TURNS[0] | {"from": "user"}, TURNS[1]]}, "turn 0 is from 'user' where"),
    ({"conversations": [TURNS[0] | {"image": "1.jpg"}, TURNS[1]]}, "turn 0 has 'image', which is"),
    ({"image": ["1.jpg", "2.jpg"]}, "1 <image> tags for 2 images"), ({"image": [7]}, "file name"),
    ({"image": 0}, "image is 0"), ({"image": {"path": "1.jpg"}}, "image is {"),
    ({"image": None, "images": ["1.jpg", "2.jpg"]}, "1 <image> tags for 2 images"),
    ({"video": "clip.mp4"}, "'video' is not read"), ({"Image": "1.jpg"}, "'Image' is not read"),
    ({"audio": "a.wav"}, "'audio' is not read"), ({"system": "Meow."}, "'system' is not read")])
def test_what_is_wrong_with_a_record_is_said(change, says):
    """Before step 0, by the check, and never as a loss that is zero; a clip is not trained on as
    text alone, whatever its key."""
    record = RECORD | change if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=re.escape(says)):
        normal_record(record)
    fine = RECORD | {"video": None, "images": [], "audio": "", "source": "web", "id": [7]}
    assert normal_record(fine) == {"system": None, "image": ["7.jpg"], "conversations": TURNS}


def test_records_are_found_and_named(tmp_path):
    """Every message names its sample by file, place and id; half a surrogate pair survives."""
    rows = [RECORD, {"id": "\ud83d", "conversations": [{"value": "\ud83d"}]}, "text"]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    records = Records([tmp_path / "chat.json"])
    assert records[0] == RECORD | {"image": ["7.jpg"], "system": None}
    assert [records.where(i) for i in range(3)] == [
        "chat.json[0] (id 7)", "chat.json[1] (id \\ud83d)", "chat.json[2]"]
    assert "--images" in records.problem(0, records[0], None)
    assert "turn 0 is from None" in records.problem(1, records[1], "images")
    assert "a str where an object" in records.problem(2, records[2], "images")
    other = Records([f"{tmp_path}/chat.json=6"])
    assert records.checksum != other.checksum and len(other) == 6
    for content, says in ((b"[]", "no records in it"), (b"PAR1\0\0", "Parquet")):
        (tmp_path / "none.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"none.json.*{says}"):
            Records([tmp_path / "none.json"])


# --------------------------------------------------------------------------------------------------
# Writing


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    """A kill or an error in the middle leaves the file of before, and nothing beside it."""
    path = tmp_path / "new" / "x.json"
    files.write_json(path, {"a": "é"})
    with pytest.raises(ZeroDivisionError):
        files.write_array(path, (1 / n for n in (2, 1, 0)))
    assert json.loads(path.read_text()) == {"a": "é"} and os.listdir(path.parent) == ["x.json"]
    files.write_array(path, [{"a": "\ud83d"}, 2])
    assert list(files.read_json(path)) == [{"a": "\ud83d"}, 2]


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path):
    """Neither is replaced by a regular file."""
    files.write_json(tmp_path / "there.json", 1)
    (tmp_path / "link.json").symlink_to("there.json")
    files.write_json(tmp_path / "link.json", 2)
    assert (tmp_path / "link.json").is_symlink() and files.read_value(
        tmp_path / "there.json", int) == 2
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    files.write_json(tmp_path / "pipe", 3)
    assert reader.communicate()[0] == b"3\n" and not (tmp_path / "pipe").is_file()
    files.write_json("/dev/null", 4)
    assert not os.path.isfile("/dev/null")


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path):
    """However it ends: the next one need not clean up."""
    program = ("import sys; from parts.files import lock_folder, run_main\n"
               "def main():\n    with lock_folder(sys.argv[1]): print('mine')\nrun_main(main)")
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with files.lock_folder(tmp_path / "out"):
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1
    assert second.stderr.startswith("error: ") and "another process" in second.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "mine\n"


# --------------------------------------------------------------------------------------------------
# What is typed


@dataclass(frozen=True, kw_only=True)
class Base:
    count: int = 3                       # how many, 50% of all


@dataclass(frozen=True, kw_only=True)
class Flags(Base):
    """A class of flags, as every command has one."""
    name: str                            # whose
    count: int = 5                       # how many, 100% of all
    words: list[str] = ("a", "b")        # which
    fast: bool = True                    # without a look
    mode: str = None                     # one of two
    CHOICES: ClassVar[dict] = {"mode": ["x", "y"]}


def test_flags_are_the_fields_and_only_what_was_typed_comes_back(capsys):
    """A field, its flag and its help are one line; no abbreviation and no unknown flag passes."""
    typed = files.typed_flags(Flags, ["--name", "n", "--words", "c", "d", "--no-fast"], "What.")
    assert typed == {"name": "n", "words": ["c", "d"], "fast": False}
    for wrong in (["--nam", "n"], ["--name", "n", "--mode", "z"], ["--name", "n", "--other", "1"],
                  []):
        with pytest.raises(SystemExit):
            files.typed_flags(Flags, wrong, "What.")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        files.typed_flags(Flags, ["-h"], "What.")
    shown = " ".join(capsys.readouterr().out.split())
    assert "how many, 100% of all (default: 5)" in shown and "which (default: a b)" in shown
    assert "(default: None)" not in shown and "{x,y}" in shown


def test_a_number_out_of_range_is_named():
    """Infinity and NaN are typed, too."""
    for value in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"--count {value}: a number is needed, 1 or more"):
            files.check_least(Base(count=value), count=1)
    files.check_least(Base(count=None), count=1)


@pytest.mark.parametrize("argv, says", [
    ([], "no command given"), (["make"], "make is no command"), (["score"], "score is no command")])
def test_a_command_is_needed(argv, says):
    """Of one word or two; whoever types none learns which there are."""
    commands = {"run": (print, Base), "score all": (print, Base)}
    with pytest.raises(ValueError, match=f"{says}; one of run, score all"):
        files.parse_command(commands, argv)
    assert files.parse_command(commands, ["score", "all", "--count", "2"]) == (print, Base(count=2))


def test_no_traceback_for_a_users_error_or_a_reader_that_leaves():
    """`error: ...` and exit status 1; nothing at all behind `| head`."""
    program = "from parts.files import run_main\ndef main():\n    {}\nrun_main(main)"
    wrong = subprocess.run([sys.executable, "-c", program.format("raise ValueError('no such')")],
                           cwd=ROOT, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (1, "error: no such\n")
    many = program.format("[print('x' * 99) for _ in range(9999)]")
    piped = subprocess.run(["bash", "-c", f'{sys.executable} -c "{many}" | head -1'], cwd=ROOT,
                           capture_output=True, text=True)
    assert piped.stdout == "x" * 99 + "\n" and not piped.stderr
