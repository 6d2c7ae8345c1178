"""REACT's retrieval (extras/retrieve.py): corpus, index, queries, on a tiny CLIP made here."""
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, lines, write_tar
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from extras import retrieve
from parts.views import preprocess

faiss = pytest.importorskip("faiss")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250,) * 3}
TEMPLATES = ["a {} square", "a picture of a {} thing"]
QUICK = ["--workers", "0", "--device", "cpu"]


def save_clip(folder, seed=0):
    """A tiny CLIP with its tokenizer, as --clip takes it."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    vision = tower | {"image_size": 28, "patch_size": 14}
    text = tower | {"vocab_size": 320, "max_position_embeddings": 40, "bos_token_id": 1,
                    "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = CLIPConfig(projection_dim=24, vision_config=vision, text_config=text)
    CLIPModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def square(i, colour):
    """A square of a colour on grey."""
    picture = Image.new("RGB", (30, 30), (90 + i % 40,) * 3)
    picture.paste(COLOURS[colour], (i % 15, i % 13, i % 15 + 12, i % 13 + 12))
    return picture


def png(i=0, colour="red"):
    data = io.BytesIO()
    square(i, colour).save(data, "png")
    return data.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """corpus.tsv and labels.tsv of 64 pictures, class names and templates, in one folder."""
    folder = tmp_path_factory.mktemp("corpus")
    rows, labels = [], []
    for i in range(64):
        colour = list(COLOURS)[i % 4]
        square(i, colour).save(folder / f"{i}.png")
        rows.append(f"{i}.png\ta {colour} square, number {i}\n")
        labels.append(f"{i}.png\t{colour}\n")
    (folder / "corpus.tsv").write_text("".join(rows))
    (folder / "other.tsv").write_text("".join(rows[:32]))
    (folder / "labels.tsv").write_text("".join(labels))
    (folder / "classes.txt").write_text("\n".join(COLOURS))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    return folder


def run_index(clip, corpus, out, source="corpus.tsv"):
    retrieve.main(["index", "--clip", clip, "--corpus", f"{corpus}/{source}", "--images",
                   str(corpus), "--out", str(out), "--batch_size", "10", *QUICK])


def run_retrieve(clip, corpus, index, out, **flags):
    flags = {"classes": corpus / "classes.txt", "templates": corpus / "templates.txt"} | flags
    argv = ["retrieve", "--index", index, "--clip", clip, "--out", out, "--device", "cpu"]
    for name, value in flags.items():
        argv += [f"--{name}", *(value if isinstance(value, list) else [value])]
    retrieve.main(list(map(str, argv)))


@pytest.fixture(scope="module")
def index(clip, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    run_index(clip, corpus, folder)
    return folder


# -----------------------------------------------------------------------------
# Corpus


def test_a_corpus_is_read_from_a_table_json_lines_a_folder_or_tar_shards(tmp_path):
    """The same two pairs in four forms; a picture in a shard is read where it lies. A text may hold
    a tab, a STOP and <image>, which CLIP reads as any other."""
    (tmp_path / "f").mkdir()
    members = {"0.png": png(), "0.txt": b"one red", "1.png": png(1), "1.txt": b"two\t### <image>\n"}
    for name, data in members.items():
        (tmp_path / "f" / name).write_bytes(data)
    write_tar(tmp_path / "c.tar", members.items())
    texts = {"0.png": "one red", "1.png": "two\t### <image>"}
    (tmp_path / "c.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in texts.items()))
    rows = [json.dumps({"image": i, "caption": text}) for i, text in texts.items()]
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    for source in ("f", "c.tsv", "c.jsonl", "c.tar"):
        left_out = []
        pairs = list(retrieve.read_pairs([str(tmp_path / source)], tmp_path / "f", left_out))
        assert [pair.text for pair in pairs] == ["one red", "two ### <image>"], source
        assert not left_out, source
        for i, pair in enumerate(pairs):
            assert pair.picture().tobytes() == square(i, "red").tobytes(), source


def test_what_cannot_be_a_pair_is_counted_and_shown(clip, tmp_path, capsys):
    """A torn shard, members that are alone, an empty text, a corrupt picture: none is silent."""
    write_tar(tmp_path / "a.tar", [
        ("0.png", png()), ("0.txt", b"fine"), ("1.png", png()), ("2.txt", b"alone"),
        ("3.png", b"no picture"), ("3.txt", b"corrupt"), ("4.png", png()), ("4.txt", b" ")])
    shard = write_tar(tmp_path / "b.tar", [
        ("0.png", png()), ("0.txt", b"fine"), ("1.png", png()), ("1.txt", b"lost")])
    data = bytearray(shard.read_bytes())
    data[2048:2560] = b"\x07" * 512                      # the header of the second picture
    shard.write_bytes(data)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.tsv").write_text("bad.png\tone\nbad.png\tone\n")
    sources = [str(tmp_path / "a.tar"), str(shard)]
    for _ in range(2):                                   # the second time, all is done
        retrieve.main(["index", "--clip", clip, "--corpus", *sources, f"{tmp_path}/bad.tsv",
                       "--images", str(tmp_path), "--out", str(tmp_path / "out"), *QUICK])
        assert "2 pairs, flat; 7 left out" in capsys.readouterr().out
    reasons = " ".join(why for _, why in lines(tmp_path / "out" / "left_out.jsonl"))
    for why in ("no text beside it", "no picture beside", "empty", "not a readable picture",
                "damaged at byte 2048"):
        assert why in reasons, why
    with pytest.raises(ValueError, match="not one of 2 pictures can be read; 2 left out\n"):
        run_index(clip, tmp_path, tmp_path / "none", "bad.tsv")


def test_the_text_of_a_shard_is_its_txt_and_else_the_caption_of_its_json(tmp_path):
    """In any order; a null, a second caption, half a character and other bytes are left out."""
    members = {
        "0.json": b'{"url": "x"}', "0.txt": b"from text", "1.json": b'{"caption": "from JSON"}',
        "2.json": b'{"caption": null}', "3.json": b'{"caption": "a", "caption": "b"}',
        "4.json": b'{"caption": "\\ud83d"}', "5.txt": "\ufeffa caf\xe9".encode(), "6.txt": b"\xe9"}
    members |= {f"{i}.png": png() for i in range(7)}
    write_tar(tmp_path / "c.tar", members.items())
    left_out = []
    pairs = list(retrieve.read_pairs([str(tmp_path / "c.tar")], ".", left_out))
    assert [pair.text for pair in pairs] == ["from text", "from JSON", "a caf\xe9"]
    assert len(left_out) == 4, left_out


def test_members_that_are_no_files_are_left_out_and_counted(tmp_path):
    """Folders and dangling links called like pictures and texts, a name that is there twice."""
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name, kind in (("0.png", tarfile.DIRTYPE), ("1.png", tarfile.SYMTYPE),
                           ("2.txt", tarfile.DIRTYPE), ("3.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "gone"
            tar.addfile(info)
        for text in (b"first", b"second"):
            for name, data in (("4.png", png()), ("4.txt", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    left_out = []
    [pair] = retrieve.read_pairs([str(tmp_path / "c.tar")], ".", left_out)
    assert pair.text == "first" and len(left_out) == 6, left_out
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.png").symlink_to("gone")
    (tmp_path / "f" / "1.txt").write_text("its picture is gone")
    [pair] = retrieve.read_pairs([str(tmp_path / "f")], ".", left_out)
    assert "No such file" in pair.problem()


@pytest.mark.parametrize("row, says", [
    ({"image": "../a.png", "caption": "x"}, "'../a.png' leaves the image folder"),
    ({"image": 7, "caption": "x"}, "c.json, line 2: .*image: 7 where text belongs"),
    ({"image": "a.png", "caption": None}, "c.json, line 2: .*caption: None where text belongs"),
    (5, "c.json, line 2: .*5 where an object belongs")])
def test_a_row_of_a_list_that_is_no_pair_is_an_error(tmp_path, row, says):
    """A list is written by a program: what is wrong with one row is wrong with many."""
    rows = [json.dumps({"image": "a.png", "caption": "fine"}), json.dumps(row)]
    (tmp_path / "c.json").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=says):
        list(retrieve.read_pairs([str(tmp_path / "c.json")], tmp_path, []))


# -----------------------------------------------------------------------------
# Index


def test_features_are_CLIPs_own_of_length_1(clip, index):
    """Inner products of the stored features are cosines: transformers', to float16's precision."""
    model = CLIPModel.from_pretrained(clip).eval()
    pairs = [retrieve.Corpus(index)[i] for i in range(8)]
    X = torch.stack([preprocess(pair.picture(), 28) for pair in pairs])
    texts = [pair.text for pair in pairs]
    ids = retrieve.tokenise_for_clip(texts, byte_tokenizer(), model.config.text_config)
    out = model(input_ids=ids, pixel_values=X)
    for key, theirs in (("image", out.image_embeds), ("text", out.text_embeds)):
        ours = torch.from_numpy(np.load(index / f"{key}.npy")[:8]).float()
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_an_old_CLIP_config_ends_its_texts_with_the_tokenizers_end():
    """openai/clip-vit-base-patch32 has eos_token_id 2, which transformers takes for the largest."""
    config = CLIPConfig(text_config={"eos_token_id": 2, "max_position_embeddings": 40}).text_config
    tokenizer = byte_tokenizer()
    a, b = tokenizer.encode("ab")
    ids = retrieve.tokenise_for_clip(["ab", "a"], tokenizer, config)
    assert ids.tolist() == [[1, a, b, 2], [1, a, 2, 2]]
    long = retrieve.tokenise_for_clip(["x" * 99], tokenizer, config)
    assert long.shape == (1, 40) and long[0, -1] == 2, "a text that is cut must still end"


def test_an_index_that_was_killed_goes_on_bit_for_bit(clip, corpus, index, tmp_path, monkeypatch):
    """What is encoded is not encoded again; another CLIP or corpus is refused."""
    encode_pairs, started_at = retrieve.encode_pairs, []

    def dies_once(*args):
        started_at.append(args[3])
        for i, batch in enumerate(encode_pairs(*args)):
            if len(started_at) == 1 and i == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(retrieve, "encode_pairs", dies_once)
    with pytest.raises(KeyboardInterrupt):
        run_index(clip, corpus, tmp_path)
    with pytest.raises(ValueError, match="30 of 64 pairs are encoded"):
        retrieve.open_index(tmp_path)
    run_index(clip, corpus, tmp_path)
    assert started_at == [0, 30]
    for file in ("image.npy", "text.npy", "pairs.jsonl", "text.faiss", "image.faiss"):
        assert (tmp_path / file).read_bytes() == (index / file).read_bytes(), file
    other = save_clip(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="begun with another CLIP or corpus"):
        run_index(other, corpus, tmp_path)
    with pytest.raises(ValueError, match="begun with another CLIP or corpus"):
        run_index(clip, corpus, tmp_path, "other.tsv")
    assert len(retrieve.open_index(tmp_path)[1]) == 64, "the refused command changed the index"


def clusters(n, queries, D):
    """Unit vectors around centres, and queries nearer to these: (n, D) float16, float32."""
    rng = np.random.default_rng(0)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def near(count, distance):
        noise = rng.standard_normal((count, D), dtype=np.float32)
        return unit(middles[rng.integers(200, size=count)] + distance * noise)

    middles = unit(rng.standard_normal((200, D), dtype=np.float32))
    return near(n, 0.08).astype(np.float16), near(queries, 0.03)


@pytest.mark.parametrize("kind, D, least", [
    ("hnsw", 128, 0.98), pytest.param("compressed", 4, 0.5, marks=pytest.mark.slow)])
def test_an_index_finds_what_exact_search_finds(kind, D, least):
    """recall@50 on clustered vectors. Of 200,000 of 512 dimensions docs/react.md has the figure."""
    kinds = [retrieve.kind_for(n) for n in (9_999, 10_000, 10_000_000, 10_000_001)]
    assert kinds == ["flat", "hnsw", "hnsw", "compressed"]
    features, queries = clusters(3_000, 100, D=D)
    rows = np.arange(len(features))
    exact = retrieve.build_index(features, rows, "flat")
    approximate = retrieve.build_index(features, rows, kind)
    _, found = retrieve.search_index(approximate, queries, 50)
    _, truth = retrieve.search_index(exact, queries, 50)
    recall = np.mean([len(set(a) & set(b)) / 50 for a, b in zip(found, truth, strict=True)])
    assert recall >= least
    if kind == "compressed":
        assert faiss.extract_index_ivf(approximate).code_size == D // 2, "half a byte a dimension"


# -----------------------------------------------------------------------------
# Queries


def test_every_class_meets_every_template():
    """Diss. Eq. 2.1: ImageNet's 1,000 classes x 80 templates are 80,000 queries."""
    classes, templates = [f"class {i}" for i in range(1000)], [f"{i} {{}}" for i in range(80)]
    queries = retrieve.queries_of(classes, templates)
    assert len(set(queries)) == 80_000 and queries[81] == ("class 1", 1, "1 class 1")


def test_what_is_retrieved_is_the_brute_force_top_k_each_once(clip, corpus, index, tmp_path):
    """Diss. Eqs. 2.2, 2.3: a set of pairs, each with all the queries that hit it."""
    run_retrieve(clip, corpus, index, tmp_path, k=12, keys=["image", "text"])
    model, tokenizer = retrieve.load_clip(clip)
    want = {}
    for name in COLOURS:
        for t, template in enumerate(TEMPLATES):
            v = retrieve.text_features(model, tokenizer, [template.format(name)])[0].numpy()
            for key in ("image", "text"):
                similar = np.load(index / f"{key}.npy").astype(np.float32) @ v
                for i in np.argsort(-similar)[:12].tolist():
                    want.setdefault(i, {}).setdefault(name, set()).add((t, key))
    rows = lines(tmp_path / "retrieved.jsonl")
    found = {row["pair"]: {name: {(t, key) for t, key, _ in hits}
                           for name, hits in row["hits"].items()} for row in rows}
    assert found == want and len(rows) == len(want)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["queries"], report["keys"]) == (8, ["T2I", "T2T"])
    assert report["pairs"] == len(rows)
    assert report["classes"]["red"] == sum("red" in row["hits"] for row in rows)
    assert (tmp_path / "grid.png").stat().st_size > 5000


def change_facts(path, **facts):
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_what_does_not_belong_together_is_refused(clip, corpus, index, tmp_path):
    """A class there twice, no template, features of another model, a damaged index, a corpus that
    has changed."""
    folder = shutil.copytree(index, tmp_path / "index")

    def is_refused(message, clip=clip, folder=folder, **flags):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_retrieve(clip, corpus, folder, tmp_path / "out", **flags)
    terms = tmp_path / "terms.txt"
    terms.write_text("red\nred\n")
    is_refused("class names are needed, one a line, each once", classes=terms)
    is_refused("is no template", templates=corpus / "classes.txt")
    is_refused("is not the model that", clip=save_clip(tmp_path / "clip", seed=1))
    is_refused("No such file.*index.json", folder=tmp_path)
    for content in (b"none", (index / "image.faiss").read_bytes()[:-9]):
        (folder / "image.faiss").write_bytes(content)
        is_refused("image.faiss cannot be read; index the corpus again")
    pairs = (folder / "pairs.jsonl").read_text()
    (folder / "pairs.jsonl").write_text(pairs.replace("red", "tan"))
    is_refused("pairs.jsonl or a file beside it is not what was indexed; index again")
    change_facts(folder / "index.json", corpus={__file__: 1})
    is_refused("is not of this corpus any more")
    change_facts(folder / "index.json", done="64")
    is_refused("done: '64' where a whole number belongs")
