"""200 mutated inputs for each command that reads files without a GPU: a result or a clear error,
never another exception, and never another result where a mutation leaves the meaning."""
import copy
import gzip
import importlib
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import test_retrieve
from conftest import chat

clip = test_retrieve.clip
OTHERS = [None, True, False, 0, -1, 2.5, 10 ** 30, math.nan, math.inf, "", "x", "a\0b", "\ud83d",
          [], {}, [None], {"a": [1]}]


def rows(**fields):
    """Three records; "#" in a text stands for a record's number, and "ID" for the number itself."""
    text = json.dumps(fields)
    return [json.loads(text.replace('"ID"', i).replace("#", i)) for i in "012"]


def by_id(**fields):
    return dict(zip("012", rows(**fields), strict=True))


PICTURES = rows(id="ID", file_name="#.jpg", width=200, height=100)
QUESTION = {"question_id": "ID", "image": "#.jpg", "question": "What is #?",
            "answers": [{"answer": "b"}] * 8 + [{"answer": "2"}] * 2, "multiple_choice_answer": "2"}
VQA = rows(**QUESTION, image_id="ID")
ASKED = rows(question_id="ID", image="#.jpg", text="What is #?", label="yes")
SPLITS = {split: row | {"category": split} for split, row in
          zip(("random", "popular", "adversarial"), ASKED, strict=True)}
FILES = {
    "chat.json": rows(id="ID", image="a.png", conversations=chat("<image>\nWhat?", "It is #.")),
    "contexts.jsonl": rows(id="ID", image="#.jpg", captions=["a bus #", "a dog"],
                           instances=[{"category": "bus", "bbox": [0.1, 0.2, 0.5, 1]}]),
    "captions.json": {"images": PICTURES, "annotations": rows(image_id="ID", caption="bus #")},
    "boxes.json": {"images": PICTURES, "categories": [{"id": 6, "name": "bus"}],
                   "annotations": rows(image_id="ID", category_id=6, bbox=[20, 25, 80, 75])},
    "pairs.jsonl": rows(image="a.png", caption="a red dog on a bench #"),
    "pairs.tsv": "".join(f"a.png\ta red dog on a bench {i}\n" for i in "012"),
    "pid_splits.json": {"test": list("012"), "train": list("012")},
    "problems.json": by_id(question="Which #?", choices=["red", "blue"], answer=1, hint="",
                           image=None, subject="natural science", grade="grade#", lecture="L.",
                           solution="S."),
    "reviews.jsonl": rows(question_id="ID", category="conv", tuple=[8, 7], judge="j"),
    "answers.jsonl": rows(question_id="ID", prompt="What is #?", text="B"),
    "yes.jsonl": rows(question_id="ID", prompt="What is #?", text="Yes"),
    "asked.jsonl": list(SPLITS.values()),
    **{f"{split}.jsonl": [row] for split, row in SPLITS.items()},
    "two.jsonl": [{"question_id": f"count/{i}.jpg", "prompt": f"Is it {j}?", "text": "Yes"}
                  for i in "01" for j in "12"],
    "count.txt": "".join(f"{i}.jpg\tIs it {j}?\tYes\n" for i in "01" for j in "12"),
    "sheet.tsv": "index\tquestion\tA\tB\tanswer\tcategory\tl2-category\n" + "".join(
        f"{i}\tWhich?\tx\ty\tB\tc\tl\n" for i in "012"),
    "seed.json": {"question_type": {"Scene": 1}, "questions": rows(
        question_id="ID", question_type_id=1, data_type="image", answer="B")},
    "vqa.json": {"annotations": VQA, "data": rows(**QUESTION, image_id="#"), "questions": VQA},
    "vqa_asked.json": {"questions": rows(question_id="ID", image_id="ID", question="What is #?")},
    "vizwiz.json": VQA,
    "gqa.json": by_id(imageId="#", question="Q?", answer="b", isBalanced=True,
                      types={"structural": "query"}),
    "mmmu.json": rows(id="#", question="Which #?", image_1="#.jpg", answer="B",
                      question_type="multiple-choice", options="['x', 'y']"),
    "math.json": by_id(question="Which #?", image="#.jpg", answer="2", choices=["x", "2"],
                       question_type="multi_choice", answer_type="text"),
    "choices.json": rows(image_id="ID", question="Q?", choices=["x", "2"], correct_choice_idx=1),
    "regions.json": rows(image="#.jpg", width=99, height=50, phrase="thing #", box=[9, 9, 20, 30]),
    "covers.json": by_id(imageURL="http://x/#.jpg", questions=["Who?", "Is it #?"],
                         answers=["Ann", "No"], split=1),
    "refs.json": rows(image_id="ID", ann_id="ID", split="train", sentences=[{"sent": "man #"}]),
    "objects.json": {"images": PICTURES, "annotations": rows(id="ID", bbox=[20, 25, 80, 75])},
    "vg.json": rows(id="ID", regions=[{"phrase": "#", "x": 1, "y": 2, "width": 9, "height": 9}]),
    "vg_data.json": rows(image_id="ID", url="http://x/VG_100K/#.jpg", width=99, height=50),
    "pages.json": rows(file_name="#.jpg", ground_truth='{"gt_parse": {"text_sequence": "a #"}}'),
    "mixture.json": rows(id="ID", image="gqa/images/#.jpg",
                         conversations=chat("<image>\nWhat?", "It is #."))}
INSTRUCT = "generate_data instruct --out out --mix conversation=1 --base_url URL --captions"
INDEX = "retrieve index --clip CLIP --images . --out out --workers 0 --device cpu --corpus"
ANSWERS = "--json out --answers answers.jsonl --labels"
RESULTS = ("instruct.json", "pairs.tsv", "pairs.jsonl")
SCIENCE = ("problems.json", "pid_splits.json")
LABELS = " ".join(f"{split}.jsonl" for split in SPLITS)
COMMANDS = f"""
    data stats chat.json --images . --workers 0 --llm LLM
    data show chat.json --images . --llm LLM --index 1
    {INSTRUCT} contexts.jsonl
    {INSTRUCT} captions.json --instances boxes.json
    generate_data expand --out out --pairs pairs.jsonl
    generate_data expand --out out --pairs pairs.tsv
    eval score scienceqa {ANSWERS} .
    eval scienceqa_data --out out --labels .
    eval score llava_bench --json out --reviews reviews.jsonl
    benchmarks score pope --json out --answers yes.jsonl --questions asked.jsonl --labels {LABELS}
    benchmarks score mme --json out --answers two.jsonl --labels count.txt
    benchmarks score mmbench {ANSWERS} sheet.tsv
    benchmarks score seed_bench {ANSWERS} seed.json
    benchmarks score vqav2 {ANSWERS} vqa.json
    benchmarks score textvqa {ANSWERS} vqa.json
    benchmarks score vizwiz {ANSWERS} vizwiz.json
    benchmarks score gqa {ANSWERS} gqa.json
    benchmarks score mmmu {ANSWERS} mmmu.json
    benchmarks score mathvista {ANSWERS} math.json
    benchmarks mmmu_data --questions out --images pictures --labels mmmu.json
    benchmarks mathvista_data --questions out --images pictures --labels math.json
    academic convert --out out --questions vqa_asked.json --annotations vqa.json
    academic convert --out out --questions gqa.json
    academic convert --out out --questions choices.json
    academic convert --out out --questions regions.json
    academic convert --out out --questions covers.json
    academic convert --out out --questions refs.json --annotations objects.json
    academic convert --out out --questions vg.json --annotations vg_data.json
    academic convert --out out --questions pages.json
    academic convert --out out --questions chat.json
    academic split --out out --data mixture.json
    concept_filter --least 1 --out out --pairs pairs.jsonl
    {INDEX} pairs.jsonl
    {INDEX} pairs.tsv""".strip().splitlines()


def as_bytes(file, value):
    """What a file holds; a key that ends in \\1 is written without it, for a second time."""
    values = value if file.endswith("jsonl") else [value]
    text = value if isinstance(value, str) else "\n".join(map(json.dumps, values))
    return text.replace("\\u0001", "").encode()


def places(value):
    """Yield (container, key) of all that a value holds."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def as_another_type(value, rng):
    """A value as another tool would write it."""
    if isinstance(value, bool):
        return rng.choice([str(value).lower(), int(value)])
    if isinstance(value, int):
        return rng.choice([str(value), float(value)])
    return int(value) if isinstance(value, str) and value.isdigit() else value


def changed_value(file, rng):
    """A file with one value replaced, dropped, doubled or nested; is its meaning the same?"""
    value = copy.deepcopy(FILES[file])
    container, key = rng.choice(list(places(value)))
    old = container[key]
    way = rng.choice(["other", "type", "type", "drop", "double", "nest"])
    others = {"other": rng.choice(OTHERS), "type": as_another_type(old, rng), "nest": [old]}
    is_same = way == "type"
    if way == "drop":
        del container[key]
    elif way in others:
        container[key] = others[way]
    elif isinstance(container, list):
        container.append(old)
    else:
        container[f"{key}\1"] = rng.choice(OTHERS)
        is_same = True
    return as_bytes(file, value), is_same


def changed_bytes(file, rng):
    """A file that is cut, flipped, nested, or encoded in another way; is its meaning the same?"""
    content = as_bytes(file, FILES[file])
    at = rng.randrange(len(content))
    before, byte, behind = content[:at], content[at], content[at + 1:]
    return rng.choice([
        (before, False), (before + b"[" * 5000, False), (b"[" * 5000, False),
        (before + bytes([byte ^ 1 << rng.randrange(8)]) + behind, False),
        (before + b"\xe9" + behind, False), (content.replace(b"\t", b"", 1), False),
        (b"\xef\xbb\xbf" + content, True), (content.replace(b"\n", b"\r\n"), True),
        (content.decode().encode("utf-16"), True), (gzip.compress(content, mtime=0), True)])


def result_of(main, argv, capsys):
    """What a command writes or prints; None after an error with words of its own."""
    shutil.rmtree("out") if Path("out").is_dir() else Path("out").unlink(missing_ok=True)
    try:
        main(argv)
    except (ValueError, OSError, SystemExit) as error:
        is_ours = type(error) is ValueError or not isinstance(error, ValueError)
        assert is_ours and str(error), f"{type(error).__name__}: {error}, which names no file"
        return None
    printed = capsys.readouterr().out
    results = filter(Path.is_file, map(Path, ("out", *(f"out/{name}" for name in RESULTS))))
    return next((path.read_text() for path in results), printed)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command.strip() for command in COMMANDS])
def test_no_input_ends_in_a_traceback_or_changes_a_result_in_silence(
        command, parts, clip, serve, tmp_path, monkeypatch, capsys):
    """Values of other types, keys dropped or doubled, cut and flipped files, other encodings."""
    values = {"CLIP": clip, "LLM": f"{parts}/llm"}
    if "URL" in command:
        values["URL"] = serve()[0]
    module, *argv = [values.get(word, word) for word in command.split()]
    folder = "" if module in ("data", "eval", "generate_data") else "extras."
    main = importlib.import_module(folder + module).main
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("a.png").write_bytes(test_retrieve.png())
    for file, value in FILES.items():
        Path(file).write_bytes(as_bytes(file, value))
    want = result_of(main, argv, capsys)
    assert want, "it fails without any mutation"
    used = [file for file in FILES if file in argv or argv[-1] == "." and file in SCIENCE]
    rng = random.Random(command)
    for _ in range(100 if module in ("retrieve", "generate_data") else 200):      # two forms each
        file = rng.choice(used)
        is_text = isinstance(FILES[file], str) or rng.random() < 0.3
        content, is_same = changed_bytes(file, rng) if is_text else changed_value(file, rng)
        Path(file).write_bytes(content)
        try:
            found = result_of(main, argv, capsys)
        except Exception as error:
            raise AssertionError(f"{file}: {content[:2000]}") from error
        assert not is_same or found in (None, want), f"{file}: {content[:2000]}: {found}"
        Path(file).write_bytes(as_bytes(file, FILES[file]))
