"""Stage 1's pairs: where they come from, and which of CC3M's are kept."""
import json
import random

import pytest

import generate_data
from extras import concept_filter
from parts.annotations import read_caption_pairs
from parts.files import brief_instructions, read_json
from parts.records import normal_record


def test_phrases_are_the_words_between_function_words():
    """OURS: a rough finder that needs no tagger."""
    captions = ["A small dog sits on the wooden bench.", "Two people, a man's hat!", ""]
    assert list(concept_filter.light_phrases(captions)) == [
        {"small dog", "wooden bench"}, {"people", "man's hat"}, set()]


def test_the_concept_filter_follows_the_papers_rule():
    """Against a slow loop: all captions of a rare phrase, `most` of a frequent one, no other."""
    rng = random.Random(0)
    captions = []
    for _ in range(3000):
        captions.append({f"c{int(rng.paretovariate(0.5))}" for _ in range(rng.randint(0, 3))})
    stays, before, after = concept_filter.concept_filter(captions, most=50, least=3)
    where = {}
    for i, phrases in enumerate(captions):
        for phrase in sorted(phrases):
            where.setdefault(phrase, []).append(i)
    assert before.tolist() == [len(found) for found in where.values()]
    assert after.tolist() == [sum(stays[i] for i in found) for found in where.values()]
    must, may = set(), 0
    for phrase, found in where.items():
        if 3 <= len(found) <= 50:
            must.update(found)
        elif len(found) > 50:
            may += 50
            assert sum(stays[i] for i in found) >= 50, f"{phrase} must add 50"
    assert all(stays[i] for i in must), "a phrase of 3 to 50 captions did not add all of them"
    assert 0 < stays.sum() - len(must) <= may, "more is kept than the rule adds"
    for i, phrases in enumerate(captions):
        assert not stays[i] or any(len(where[phrase]) >= 3 for phrase in phrases)


def test_filter_and_expand_make_stage_1s_file(tmp_path):
    """A TSV in CC3M's order of columns -> pairs.tsv -> LLaVA's JSON with a brief instruction."""
    nouns = ["old bridge", "green field", "tall tower"]
    rows = [f"a {nouns[i % 3]} near the {nouns[(i + 1) % 3]}\t{i}.jpg" for i in range(600)]
    (tmp_path / "cc.tsv").write_text("\n".join([*rows, "an unheard thing\tx.jpg"]) + "\n")
    concept_filter.main(["--pairs", str(tmp_path / "cc.tsv"), "--out", str(tmp_path / "f"),
                         "--columns", "caption image"])
    counts = json.loads((tmp_path / "f" / "metadata.json").read_text())
    assert counts["pairs"] == 601 and 100 <= counts["kept"] <= 300
    assert counts["phrases_frequent"] == 3 == counts["phrases_covered"]
    assert (tmp_path / "f" / "coverage.png").stat().st_size > 5000
    generate_data.main(["expand", "--pairs", str(tmp_path / "f" / "pairs.tsv"),
                        "--out", str(tmp_path / "chat.json")])
    records = list(read_json(tmp_path / "chat.json"))
    assert len(records) == counts["kept"]
    for record in records:
        question, answer = record["conversations"]
        assert question["value"].replace("<image>", "").strip() in brief_instructions()
        assert answer["value"] == rows[int(record["id"])].split("\t")[0]
        normal_record(record)


def test_a_caption_that_holds_a_stop_is_left_out_and_counted(tmp_path, capsys):
    """An answer would end there. A byte order mark is no part of the first name."""
    (tmp_path / "p.tsv").write_text("\ufeff1.jpg\ta bus\t0.31\n2.jpg\ta ### bus\n3.jpg\ta </s>\n")
    assert list(read_caption_pairs(str(tmp_path / "p.tsv"))) == [("1.jpg", "a bus")]
    assert "2 captions hold a STOP or special token" in capsys.readouterr().out


def test_pairs_come_from_json_lines_or_a_folder_too(tmp_path):
    """A folder has its captions beside its pictures."""
    (tmp_path / "p.jsonl").write_text('{"image": "a.jpg", "caption": "a  bus"}\n')
    assert list(read_caption_pairs(str(tmp_path / "p.jsonl"))) == [("a.jpg", "a bus")]
    folder = tmp_path / "pictures" / "sub"
    folder.mkdir(parents=True)
    (folder / "b.png").touch()
    with pytest.raises(FileNotFoundError, match="b.txt"):
        list(read_caption_pairs(str(tmp_path / "pictures")))
    (folder / "b.txt").write_text("a shop\n")
    assert list(read_caption_pairs(str(tmp_path / "pictures"))) == [("sub/b.png", "a shop")]


@pytest.mark.parametrize("row, columns, says", [
    ("no tab here", "image caption", "p.tsv, line 1: image and caption are needed"),
    ("a bus\thttp://x.org/1", "image caption", "line 1.*look swapped"),
    ("1.jpg\ta bus", "caption image", "line 1.*look swapped"),
    ("1.jpg\tan <image> of a bus", "image caption", "no pairs in it"),
    ("1.jpg\t ", "image caption", "caption ''"),
    ("http://x.org/a.jpg\tx", "image caption", "download")])
def test_a_pair_that_would_train_on_nonsense_is_an_error_that_leaves_nothing(
        tmp_path, row, columns, says):
    """Columns are easily swapped, and CC3M's file has addresses instead of names."""
    (tmp_path / "p.tsv").write_text(row + "\n")
    with pytest.raises(ValueError, match=says):
        generate_data.main(["expand", "--pairs", str(tmp_path / "p.tsv"), "--out",
                            str(tmp_path / "o.json"), "--columns", columns])
    assert [path.name for path in tmp_path.iterdir()] == ["p.tsv"]


def test_a_filter_that_would_keep_nothing_says_so(tmp_path):
    """And writes nothing."""
    (tmp_path / "p.tsv").write_text("1.jpg\ta bus\n")
    with pytest.raises(ValueError, match="in 3 of the 1 captions; lower --least"):
        concept_filter.main(["--pairs", str(tmp_path / "p.tsv"), "--out", str(tmp_path / "f")])
    assert not (tmp_path / "f").exists()
