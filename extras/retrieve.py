"""
Retrieval for REACT (Diss. Ch. 2): class names x templates are queries; the nearest image-text pairs
of a large corpus are what comes back.

    python -m extras.retrieve index --clip DIR|ID --corpus SHARD.tar ... --out out/index
    python -m extras.retrieve retrieve --index out/index --clip DIR|ID --classes FILE \\
        --templates FILE --out out/retrieved

    corpus --index--> features of every picture and text, and a FAISS index of each
    classes x templates (Diss. Eq. 2.1) --retrieve--> texts near them (T2T, Diss. Eq. 2.2), or
                                                      pictures near them (T2I, Diss. Eq. 2.3)

A corpus is webdataset shards (.tar), .tsv (picture, tab, text), JSON lines (image, caption) or a
folder with a .txt beside every picture. The same index command goes on after a kill. Its folder:

    pairs.jsonl, ends.npy     every pair, see `Pair`, and where its line ends
    image.npy, text.npy       features (pairs, D), float16, of length 1, or 0 for a bad picture
    image.faiss, text.faiss   what is searched
    left_out.jsonl            what of the corpus is not in it, and why
    index.json                of which corpus and CLIP all that is, and how far it has come
"""
import functools
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer

from parts.annotations import pairs_of_file, pairs_of_folder
from parts.checkpoints import kind_of, load_part, named_errors
from parts.files import (
    check_least,
    decode_json,
    errors_of_file,
    library,
    lock_folder,
    read_lines,
    read_text,
    read_value,
    run_command,
    run_main,
    typed,
    typed_fields,
    write_json,
    write_lines,
)
from parts.gated import GatedCLIP
from parts.pictures import PICTURE_EXTENSIONS, image_path, load_image
from parts.ranks import Machine, choose_device
from parts.run import fingerprints
from parts.shards import tar_members
from parts.views import preprocess

MAX_FLAT = 10_000            # pairs; more are searched by HNSW
MAX_HNSW = 10_000_000        # pairs; 23 GB at 512 dimensions; more are compressed
ROWS = 2 ** 16               # features in memory at once
KEYS = {"image": "T2I", "text": "T2T"}
INDEX_FACTS = {"clip": str, "fingerprint": int, "images": str, "corpus": dict, "crc": int,
               "done": int}


def import_faiss():
    return library("faiss", "retrieval", "faiss-cpu")


# -----------------------------------------------------------------------------
# CLIP


def load_clip(name):
    """(CLIP, its tokenizer) from a hub id or a folder, gated or not. ValueError if it is none."""
    kind = kind_of(name, "clip")
    if kind != "clip":
        raise ValueError(f"--clip {name}: its model_type is {kind!r}; retrieval and gated blocks "
                         "are CLIP's, so pass one with both towers, whose model_type is 'clip'")
    clip = load_part(GatedCLIP, name, torch.float32, "clip")
    return clip.eval(), AutoTokenizer.from_pretrained(name)


def tokenise_for_clip(texts, tokenizer, config):
    """Texts as CLIP reads them, cut at its context: ids (B, T). A row may end several times.

    OURS: CLIP pools at the id in its config. An old 2 there stands for the largest id of all, which
    is the end in the tokenizer.
    """
    end = config.eos_token_id
    if end == 2:
        end = tokenizer.eos_token_id
    length = config.max_position_embeddings - 2
    words = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=length)
    T = 2 + max(map(len, words.input_ids))
    rows = [[tokenizer.bos_token_id, *ids] for ids in words.input_ids]
    return torch.tensor([row + [end] * (T - len(row)) for row in rows])


@torch.inference_mode()
def text_features(clip, tokenizer, texts):
    """v (texts, D) float32, of length 1."""
    parts = []
    for start in range(0, len(texts), 256):
        ids = tokenise_for_clip(texts[start:start + 256], tokenizer, clip.config.text_config)
        parts.append(clip.texts(ids.to(clip.device)))
    return torch.cat(parts)


def fingerprint_of(clip):
    """A number that tells the weights of one CLIP from those of another."""
    return zlib.crc32(repr(fingerprints(clip)).encode())


# -----------------------------------------------------------------------------
# The corpus


class Pair(NamedTuple):
    """A picture and its text. The picture is a file, or bytes in the middle of one: of a shard."""
    file: str
    start: int
    size: int            # bytes; -1: to the end
    text: str

    @property
    def where(self):
        return self.file if self.size < 0 else f"{self.file} at byte {self.start}"

    def picture(self):
        """The PIL picture. FileNotFoundError, or ValueError for what is no picture."""
        with open(self.file, "rb") as f:
            f.seek(self.start)
            return load_image(io.BytesIO(f.read(self.size)), self.where)

    def problem(self):
        """Why the picture cannot be read, or None."""
        try:
            self.picture()
        except (ValueError, OSError) as error:
            return str(error)
        return None


def pairs_in_tar(path, left_out):
    """The pairs of a shard: members that share a name, one a picture and one its text.

    A .txt is the text, or else the caption of a .json. Pictures stay where they lie in the shard.
    """
    samples = {}
    with open(path, "rb") as f:
        try:
            for member in tar_members(path):
                name, extension = os.path.splitext(member.name)
                kind = "picture" if extension.lower() in PICTURE_EXTENSIONS else extension
                if kind not in ("picture", ".txt", ".json"):
                    continue
                if not member.isfile() or kind in samples.get(name, {}):
                    left_out.append((f"{path}: {member.name}", "no file, or there a second time"))
                    continue
                sample = samples.setdefault(name, {})
                if kind == "picture":
                    sample[kind] = member.offset_data, member.size
                else:
                    f.seek(member.offset_data)
                    sample[kind] = f.read(member.size)
        except (tarfile.TarError, OSError) as error:
            left_out.append((path, f"not a complete, uncompressed tar file: {error}"))
    for name, sample in samples.items():
        if "picture" in sample:
            text = sample[".txt"] if ".txt" in sample else caption_in(sample.get(".json"))
            yield Pair(path, *sample["picture"], text)
        else:
            left_out.append((f"{path}: {name}", "no picture beside it"))


def caption_in(record):
    """The caption in the .json of a shard, or None, also where it has two."""
    try:
        return decode_json(record)["caption"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def pairs_in_list(source, images):
    """The pairs of a table, of JSON lines, or of a folder. Raises ValueError for a bad line."""
    if os.path.isdir(source):
        images, pairs = source, pairs_of_folder(source)
    else:
        pairs = pairs_of_file(source, "image caption", tabs=1)
    for name, text in pairs:
        with errors_of_file(source):
            place = image_path(images, name)
        yield Pair(place, 0, -1, text)


def clean_text(text):
    """A text of a corpus, in one line. Raises ValueError for what is none."""
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    text = " ".join(typed(text, str, "no text beside it").split())
    if not text:
        raise ValueError("its text is empty")
    text.encode()                        # which half a surrogate pair cannot be
    return text


def read_pairs(sources, images, left_out):
    """Yield the pairs of all sources; what cannot be one goes to `left_out`, as (where, why)."""
    for source in sources:
        if source.endswith(".tar"):
            pairs = pairs_in_tar(source, left_out)
        else:
            pairs = pairs_in_list(source, images)
        for pair in pairs:
            try:
                text = clean_text(pair.text)
            except ValueError as error:
                left_out.append((pair.where, str(error)))
            else:
                yield pair._replace(text=text)


class Corpus:
    """The pairs of an index folder, read from disk one by one."""

    def __init__(self, folder):
        self.file = os.path.join(folder, "pairs.jsonl")
        self.ends = np.load(os.path.join(folder, "ends.npy"), mmap_mode="r")

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        start, end = self.ends[i:i + 2]
        with open(self.file, "rb") as f:
            f.seek(start)
            return Pair(*json.loads(f.read(end - start)))


def list_pairs(out, config):
    """Write pairs.jsonl, ends.npy and left_out.jsonl. Returns the checksum of the pairs."""
    ends, crc, left_out = [0], 0, []
    with open(out / "pairs.jsonl", "wb") as f:
        for pair in read_pairs(config.corpus, config.images, left_out):
            line = json.dumps(pair).encode() + b"\n"
            crc = zlib.crc32(line, crc)
            ends.append(ends[-1] + f.write(line))
    np.save(out / "ends.npy", np.array(ends))
    write_lines(out / "left_out.jsonl", left_out)
    if len(ends) == 1:
        raise ValueError(f"{' '.join(config.corpus)}: no pair of a picture and a text in it; "
                         f"{left_out_report(left_out)}")
    return crc


def left_out_report(left_out):
    """What was left out, for people: how many, and a few of them."""
    lines = [f"{len(left_out)} left out"]
    lines += [f"{where}: {why}" for where, why in left_out[:5]]
    return "\n  ".join(lines)


# -----------------------------------------------------------------------------
# Features


@dataclass(frozen=True)
class IndexConfig:
    clip: str                           # CLIP, a hub id or a folder
    corpus: list[str]                   # folders, .tsv, .json, .jsonl, .tar shards
    out: str                            # index folder; an unfinished one is gone on with
    images: str = "."                   # the folder that names in .tsv and .json are relative to
    batch_size: int = 256
    workers: int = 4                    # processes that decode pictures
    device: str = "auto"                # cuda, mps or cpu


def read_batch(pairs, size):
    """(X (B, 3, S, S), texts, is_readable (B,)) of pairs; X is 0 where a picture cannot be read."""
    X = torch.zeros(len(pairs), 3, size, size)
    is_readable = torch.ones(len(pairs), dtype=torch.bool)
    for i, pair in enumerate(pairs):
        try:
            X[i] = preprocess(pair.picture(), size)
        except (ValueError, OSError):
            is_readable[i] = False
    return X, [pair.text for pair in pairs], is_readable


def read_batches(pairs, first, clip, config):
    """Yield what `read_batch` makes of pairs, from pair `first` on, for a CLIP."""
    collate = functools.partial(read_batch, size=clip.config.vision_config.image_size)
    loader = DataLoader(pairs, config.batch_size, sampler=range(first, len(pairs)),
                        num_workers=config.workers, collate_fn=collate)
    return tqdm(loader, desc="encoding", unit="batch", disable=None)


@torch.inference_mode()
def encode_pairs(clip, tokenizer, corpus, first, config):
    """Yield (index of a batch's first pair, u, v), from pair `first` on.

    u, v (B, D) float16, of length 1, or 0 where there is no picture.
    """
    machine = Machine(config.device)
    clip.to(machine.device)
    for X, texts, is_readable in read_batches(corpus, first, clip, config):
        ids = tokenise_for_clip(texts, tokenizer, clip.config.text_config)
        with machine.forward(clip):
            u, v, _ = clip(X.to(machine.device), ids.to(machine.device))
        u, v = (features.half().cpu() * is_readable[:, None] for features in (u, v))
        yield first, u, v
        first += len(X)


def index_corpus(config):
    """Features and an index of a corpus of image-text pairs (Diss. Eqs. 2.2, 2.3)."""
    faiss = import_faiss()               # missing, it is better met before the hours of encoding
    clip, tokenizer = load_clip(config.clip)
    with lock_folder(config.out) as out:
        facts = begin_index(out, config, fingerprint_of(clip))
        corpus = Corpus(out)
        shape = len(corpus), clip.config.projection_dim
        mode = "r+" if facts["done"] else "w+"
        features = {key: np.lib.format.open_memmap(out / f"{key}.npy", mode, np.float16, shape)
                    for key in KEYS}
        for start, u, v in encode_pairs(clip, tokenizer, corpus, facts["done"], config):
            facts["done"] = start + len(u)
            for key, part in (("image", u), ("text", v)):
                features[key][start:facts["done"]] = part
                features[key].flush()    # what is counted as done is on disk
            write_json(out / "index.json", facts)

        is_readable = features["image"].any(1)
        good = np.flatnonzero(is_readable)
        bad = [corpus[i] for i in np.flatnonzero(~is_readable)]
        left_out = [tuple(row) for row in read_lines(out / "left_out.jsonl", kind=list)]
        listed = set(left_out)           # where who runs it again finds the bad pictures already
        rows = [(pair.where, pair.problem()) for pair in bad]
        left_out += [row for row in rows if row not in listed]
        if not len(good):
            raise ValueError(f"{out}: not one of {len(corpus)} pictures can be read; "
                             f"{left_out_report(left_out)}")
        for key in KEYS:
            index = build_index(features[key], good, kind_for(len(good)))
            faiss.write_index(index, str(out / f"{key}.faiss"))
        write_lines(out / "left_out.jsonl", left_out)
    print(f"{out}: {len(good):,} pairs, {kind_for(len(good))}; {left_out_report(left_out)}")


def begin_index(out, config, fingerprint):
    """What index.json says: of a new index, whose pairs are listed first, or of one to go on with.

    Raises ValueError if that was begun with another CLIP or corpus.
    """
    asked = {"fingerprint": fingerprint, "images": config.images,
             "corpus": sizes_of(config.corpus)}
    path = out / "index.json"
    if not path.exists():
        facts = {"clip": config.clip, **asked, "crc": list_pairs(out, config), "done": 0}
        write_json(path, facts)
        return facts
    facts = typed_fields(read_value(path), path, **INDEX_FACTS)
    if facts | asked != facts:
        raise ValueError(f"{out} was begun with another CLIP or corpus, {facts['clip']} and "
                         f"{facts['corpus']}; take another --out")
    print(f"{out}: going on at pair {facts['done']}")
    return facts


def sizes_of(sources):
    """{source: its bytes, or 0 for a folder}, which tells a corpus that has changed since."""
    return {source: os.path.getsize(source) if os.path.isfile(source) else 0
            for source in sources}


# -----------------------------------------------------------------------------
# The index


def kind_for(n):
    """The kind of index that suits n pairs."""
    if n < MAX_FLAT:
        return "flat"
    return "hnsw" if n <= MAX_HNSW else "compressed"


def build_index(features, good, kind):
    """A FAISS index for inner products of the rows `good` of features (n, D), which may be on disk.

    OFFICIAL: autofaiss chooses; HNSW with 32 links for millions, and for 400 million of 512
    dimensions OPQ256_768,IVF131072_HNSW32,PQ256x8. "compressed" follows that: half a byte a
    dimension, and about 6 sqrt(n) lists.
    """
    faiss = import_faiss()
    n, D = len(good), features.shape[1]
    lists = 2 ** max(1, round(np.log2(6 * n ** 0.5)))
    names = {
        "flat": "Flat",
        "hnsw": "HNSW32",
        "compressed": f"OPQ{D // 2}_{D},IVF{lists}_HNSW32,PQ{D // 2}x8",
    }
    index = faiss.index_factory(D, names[kind], faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        drawn = np.random.default_rng(0).permutation(good)[:max(40 * lists, 20_000)]
        index.train(features[np.sort(drawn)].astype(np.float32))
    for start in range(0, n, ROWS):
        index.add(features[good[start:start + ROWS]].astype(np.float32))
    return index


def search_index(index, queries, k):
    """The k nearest of each query (Q, D) float32: similarities and rows, (Q, k); -1 is none."""
    faiss = import_faiss()
    settings = faiss.ParameterSpace()
    if isinstance(index, faiss.IndexHNSW):       # be thorough: queries are few beside the pairs
        settings.set_index_parameter(index, "efSearch", 64 * k)
    elif not isinstance(index, faiss.IndexFlat):
        settings.set_index_parameter(index, "nprobe", 64)
    return index.search(queries, min(k, index.ntotal))


def open_index(folder):
    """(index.json, Corpus, the indices of the readable pairs) of an index folder.

    Raises ValueError if it is unfinished or damaged, or if the corpus has changed since.
    """
    path = Path(folder, "index.json")
    facts = typed_fields(read_value(path), path, **INDEX_FACTS)
    corpus = Corpus(folder)
    if not Path(folder, "text.faiss").is_file():         # the last to be written
        raise ValueError(f"{folder}: {facts['done']} of {len(corpus)} pairs are encoded; the same "
                         "index command goes on")
    now = sizes_of(facts["corpus"])
    if now != facts["corpus"]:
        raise ValueError(f"{folder} is not of this corpus any more: it had {facts['corpus']} bytes "
                         f"when it was indexed, and has {now} now; index it again")
    u = np.load(Path(folder, "image.npy"), mmap_mode="r")
    crc = zlib.crc32(np.memmap(corpus.file, mode="r"))
    if crc != facts["crc"] or len(corpus) != len(u):
        raise ValueError(f"{corpus.file} or a file beside it is not what was indexed; index again")
    return facts, corpus, np.flatnonzero(u.any(1))


# -----------------------------------------------------------------------------
# Queries


@dataclass(frozen=True)
class RetrieveConfig:
    index: str                          # an index folder
    clip: str                           # the CLIP that it was made with
    classes: str                        # text file, a class name a line
    templates: str                      # text file, a template a line: a photo of a {}.
    out: str                            # folder for retrieved.jsonl, report.json and grid.png
    keys: list[str] = ("image",)        # image (T2I), text (T2T), or both
    k: int = 50                         # COURSE: pairs a query; the retrieval-size row
    device: str = "auto"                # cuda, mps or cpu

    CHOICES: ClassVar[dict] = {"keys": list(KEYS)}


def read_terms(path, what):
    """The lines of a text file, `what` they are; each may stand there once."""
    lines = read_text(path).splitlines()
    terms = Counter(line.strip() for line in lines if line.strip())
    if not terms or max(terms.values()) > 1:
        raise ValueError(f"{path}: {what} are needed, one a line, each once; found "
                         f"{terms.most_common(3)}")
    return list(terms)


def read_templates(path):
    templates = read_terms(path, "templates")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{path}: {template!r} is no template; it has one {{}} where the "
                             "class name stands")
    return templates


def queries_of(classes, templates):
    """Every class in every template (Diss. Eq. 2.1): [(class, template's number, query), ...]."""
    return [(name, t, template.replace("{}", name))
            for name in classes for t, template in enumerate(templates)]


def find_pairs(config, queries, v, good):
    """{pair: {class: [(template, key, score), ...]}} of all that the queries v (Q, D) hit."""
    faiss = import_faiss()
    hits = {}
    for key in config.keys:
        path = os.path.join(config.index, f"{key}.faiss")
        with named_errors(f"{path} cannot be read; index the corpus again"):
            index = faiss.read_index(path)
        scores, rows = search_index(index, v, config.k)
        for q, (name, t, _) in enumerate(queries):
            for score, row in zip(scores[q].tolist(), rows[q].tolist(), strict=True):
                if row >= 0:
                    by_class = hits.setdefault(int(good[row]), {})
                    by_class.setdefault(name, []).append((t, key, round(score, 4)))
    return hits


def retrieve_pairs(config):
    """The pairs nearest to class names x templates, each once (Diss. Eqs. 2.1-2.3)."""
    check_least(config, k=1)
    classes = read_terms(config.classes, "class names")
    templates = read_templates(config.templates)
    facts, corpus, good = open_index(config.index)
    clip, tokenizer = load_clip(config.clip)
    if fingerprint_of(clip) != facts["fingerprint"]:
        raise ValueError(f"--clip {config.clip} is not the model that {config.index} has features "
                         f"of, which was {facts['clip']}")
    queries = queries_of(classes, templates)
    clip.to(choose_device(config.device))
    v = text_features(clip, tokenizer, [text for _, _, text in queries])     # (Q, D)
    hits = find_pairs(config, queries, v.cpu().numpy(), good)
    ranked = {name: [] for name in classes}              # (best score, pair), the best first
    for i in hits:
        for name, found in hits[i].items():
            ranked[name].append((max(score for _, _, score in found), i))
    for pairs in ranked.values():
        pairs.sort(reverse=True)

    out = Path(config.out)
    write_lines(out / "retrieved.jsonl", [{"pair": i, "hits": hits[i]} for i in sorted(hits)])
    counts = {name: len(pairs) for name, pairs in ranked.items()}
    report = {"index": config.index, "crc": facts["crc"], "clip": config.clip, "k": config.k,
              "keys": [KEYS[key] for key in config.keys], "queries": len(queries),
              "pairs": len(hits), "corpus": len(good), "classes": counts}
    write_json(out / "report.json", report)
    draw_grid(out / "grid.png", {name: ranked[name][:6] for name in classes[:12]}, corpus)
    print(f"{out}: {len(queries):,} queries ({len(classes)} classes x {len(templates)} templates) "
          f"hit {len(hits):,} of {len(good):,} pairs; a class has {min(counts.values())} to "
          f"{max(counts.values())}")


def draw_grid(path, ranked, corpus):
    """The best pairs of some classes, as pictures with their texts.

    Look at them: what retrieval finds decides what can be learnt.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(12, 2.3 * len(ranked)))
    axes = fig.subplots(len(ranked), 6, squeeze=False)
    for row, (name, pairs) in zip(axes, ranked.items(), strict=True):
        row[0].set_ylabel(name)
        for ax in row:
            ax.set(xticks=[], yticks=[])
        for ax, (_, i) in zip(row, pairs, strict=False):
            ax.imshow(corpus[i].picture())
            ax.set_title(corpus[i].text[:40], fontsize=7)
    fig.savefig(path, dpi=70, bbox_inches="tight")


COMMANDS = {"index": (index_corpus, IndexConfig), "retrieve": (retrieve_pairs, RetrieveConfig)}


def main(argv=None):
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
