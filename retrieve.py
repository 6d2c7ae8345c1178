"""
Retrieval for REACT (Diss. Ch. 2): class names x templates are queries; the nearest image-text pairs of a corpus are what
comes back.

    corpus --index--> features of every picture and text, and a FAISS index of each
    class names x templates (Diss. Eq. 2.1) --retrieve--> texts near it (T2T, Diss. Eq. 2.2), or pictures (T2I, 2.3)

react.py has the commands. An index folder:

    pairs.jsonl, ends.npy       every pair: [file, where the picture begins, its bytes or -1 for the whole file, text]
    image.npy, text.npy         its features (pairs, D), float16, of length 1; memory-mapped. Zeros: the picture cannot be read
    image.faiss, text.faiss     what is searched; left_out.jsonl: what of the corpus is not in it, and why
    index.json                  of which corpus and CLIP all that is, and how far it has come
"""
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gated import load_clip, tokenise
from images import load_image, preprocess
from model import choose_device, choose_dtype
from records import PICTURES, image_path, read_json, write_lines

SMALL, LARGE = 10_000, 10_000_000        # pairs: below flat, to the second HNSW (23 GB at 512 dimensions), beyond it compressed
KEYS = {"image": "T2I", "text": "T2T"}


def faiss():
    try:
        import faiss
    except ImportError as error:
        raise ValueError("react.py searches with FAISS, which is not installed: pip install faiss-cpu") from error
    return faiss


# ---------------------------------------------------------------------------------------------------------------------
# The corpus


class Pair(NamedTuple):
    """A picture and its text. The picture is a file, or some bytes in the middle of one: a member of a tar shard."""
    file: str
    at: int
    size: int              # bytes; -1: to the end
    text: str

    @property
    def where(self):
        return self.file if self.size < 0 else f"{self.file} at byte {self.at}"

    def picture(self):
        """PIL. FileNotFoundError, or ValueError for what is no picture, with the name."""
        with open(self.file, "rb") as f:
            f.seek(self.at)
            return load_image(io.BytesIO(f.read(self.size)), self.where)


def pairs_in_tar(path, left_out):
    """The pairs of a webdataset shard: members that share a name, one a picture, one .txt, or .json with "caption"."""
    parts = {}
    try:
        with tarfile.open(path, "r:") as tar:            # not compressed: a picture is read where it lies
            for member in tar:
                key, extension = os.path.splitext(member.name)
                if extension in (".txt", ".json"):
                    parts.setdefault(key, {})["text"] = member.name, tar.extractfile(member).read()
                elif extension.lower() in PICTURES:
                    parts.setdefault(key, {})["picture"] = member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(2 ** 20).strip(b"\0"):   # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset}; what follows is lost")
    except (tarfile.TarError, OSError) as error:
        left_out.append((path, f"not a whole, uncompressed tar file: {error}"))
    for key, part in parts.items():
        if len(part) < 2:
            left_out.append((f"{path}: {key}", f"no {'text' if 'picture' in part else 'picture'} beside it"))
            continue
        name, data = part["text"]
        try:
            text = data.decode()
            yield Pair(path, *part["picture"], json.loads(text)["caption"] if name.endswith(".json") else text)
        except (ValueError, KeyError, TypeError) as error:
            left_out.append((f"{path}: {name}", f"not a text: {error!r}"))


def pairs_of(source, images, left_out):
    """Yield the pairs of one source, a folder or a file of one of four kinds; what cannot be one goes to `left_out`."""
    path = Path(source)
    if path.suffix == ".tar":
        yield from pairs_in_tar(source, left_out)
    elif path.is_dir():                                  # x.jpg beside x.txt
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES):
            text = file.with_suffix(".txt")
            if text.is_file():
                yield Pair(str(file), 0, -1, text.read_text(errors="replace"))
            else:
                left_out.append((str(file), "no .txt beside it"))
    elif path.suffix == ".tsv":                          # picture, tab, text
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                name, tab, text = line.rstrip("\n").partition("\t")
                if tab:
                    yield Pair(image_path(images, name), 0, -1, text)
                else:
                    left_out.append((f"{source}: line {number}", "no tab"))
    elif path.suffix in (".json", ".jsonl"):             # {"image": ..., "caption": ...}
        for number, record in enumerate(read_json(source)):
            if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("image", "caption")):
                yield Pair(image_path(images, record["image"]), 0, -1, record["caption"])
            else:
                left_out.append((f"{source}[{number}]", 'not {"image": text, "caption": text}'))
    else:
        raise ValueError(f"{source}: a corpus is a folder, or a file named .tsv, .json, .jsonl or .tar")


def read_pairs(sources, images, left_out):
    """Yield the pairs of all sources whose text is not empty."""
    for source in sources:
        if not os.path.exists(source):
            raise FileNotFoundError(f"{source}: no such file or folder")
        for pair in pairs_of(source, images, left_out):
            text = " ".join(pair.text.split())
            if text:
                yield pair._replace(text=text)
            else:
                left_out.append((pair.where, "its text is empty"))


class Corpus:
    """The pairs of an index folder, read from disk one by one."""

    def __init__(self, folder):
        self.folder, self.ends = folder, np.load(os.path.join(folder, "ends.npy"), mmap_mode="r")

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        with open(os.path.join(self.folder, "pairs.jsonl"), "rb") as f:
            f.seek(self.ends[i])
            return Pair(*json.loads(f.read(self.ends[i + 1] - self.ends[i])))


def list_pairs(folder, sources, images):
    """Write pairs.jsonl and ends.npy, with new_ before their names; returns (their checksum, what was left out)."""
    ends, crc, left_out = [0], 0, []
    with open(os.path.join(folder, "new_pairs.jsonl"), "wb") as f:
        for pair in read_pairs(sources, images, left_out):
            line = json.dumps(pair, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            crc = zlib.crc32(line, crc)
            ends.append(ends[-1] + f.write(line))
    np.save(os.path.join(folder, "new_ends.npy"), np.array(ends))
    if len(ends) == 1:
        raise ValueError(f"{', '.join(sources)}: no pair of a picture and a text in it; {said(left_out)}")
    return crc, left_out


def said(left_out, most=5):
    """What was left out, for people: how many, and a few of them."""
    return "\n  ".join([f"{len(left_out)} left out" + ", e.g." * (len(left_out) > most),
                        *(f"{where}: {why}" for where, why in left_out[:most])])


def sizes_of(sources):
    """{file: bytes} of the sources that are files: what tells a corpus that has changed since."""
    return {source: os.path.getsize(source) for source in sources if os.path.isfile(source)}


# ---------------------------------------------------------------------------------------------------------------------
# Features and index


@dataclass(frozen=True)
class Index:
    clip: str                           # CLIP, a hub id or a folder
    corpus: list[str]                   # folders, .tsv, .json, .jsonl, .tar shards
    out: str                            # index folder; an unfinished one is gone on with
    images: str = "."                   # the folder that names in .tsv and .json are relative to
    kind: str = "auto"                  # flat (exact), hnsw, compressed; auto: by the number of pairs
    batch_size: int = 256
    workers: int = 4                    # processes that decode pictures
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32


class Pictures(Dataset):
    """X of each pair's picture, or the error that it gives, with its text."""

    def __init__(self, corpus, size):
        self.corpus, self.size = corpus, size

    def __len__(self):
        return len(self.corpus)

    def __getitem__(self, i):
        pair = self.corpus[i]
        try:
            return preprocess(pair.picture(), self.size), pair.text
        except (ValueError, OSError) as error:
            return str(error), pair.text


def fingerprint(clip):
    """A number that tells one CLIP's weights from another's."""
    crc = 0
    for _, weight in sorted(clip.state_dict().items()):
        crc = zlib.crc32(weight.cpu().float().numpy().tobytes(), crc)
    return crc


@torch.inference_mode()
def encode(clip, tokenizer, corpus, args, dtype, first):
    """Yield (index of the first pair, u, v, {index: why its picture cannot be read}) of batches of pairs, from `first` on.

    u, v (B, D) float16, of length 1, or zeros where there is no picture.
    """
    size, device = clip.config.vision_config.image_size, clip.device
    loader = DataLoader(Pictures(corpus, size), args.batch_size, sampler=range(first, len(corpus)), num_workers=args.workers,
                        collate_fn=list)
    bar = tqdm(total=len(corpus), initial=first, desc="encoding", disable=None)
    for batch in loader:
        bad = {first + k: x for k, (x, _) in enumerate(batch) if isinstance(x, str)}
        X = torch.stack([torch.zeros(3, size, size) if isinstance(x, str) else x for x, _ in batch])
        ids = tokenise([text for _, text in batch], tokenizer, clip.config.text_config)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            u, v = (part.half().cpu().numpy() for part in clip(X.to(device), ids.to(device))[:2])
        for i in bad:
            u[i - first] = v[i - first] = 0
        yield first, u, v, bad
        first += len(batch)
        bar.update(len(batch))


def save_json(path, value):
    """Write under another name first: a kill leaves the old file or the new one."""
    Path(f"{path}.new").write_text(json.dumps(value, indent=1))
    os.replace(f"{path}.new", path)


def index(args):
    """Features and an index of a corpus of image-text pairs (Diss. Eqs. 2.2, 2.3)."""
    faiss()                                              # missing is better met before the hours of encoding
    out, device = Path(args.out), choose_device(args.device)
    dtype, _ = choose_dtype(args.dtype, device)
    clip, tokenizer = load_clip(args.clip)
    out.mkdir(parents=True, exist_ok=True)
    crc, left_out = list_pairs(out, args.corpus, args.images)
    facts, path = {"clip": args.clip, "fingerprint": fingerprint(clip), "corpus": list(args.corpus), "images": args.images,
                   "crc": crc, "sizes": sizes_of(args.corpus), "done": 0, "bad": {}}, out / "index.json"
    if path.exists():
        was = json.loads(path.read_text())
        if differ := [key for key in ("fingerprint", "crc", "sizes") if was[key] != facts[key]]:
            raise ValueError(f"{out} was begun with another {'CLIP' if differ[0] == 'fingerprint' else 'corpus'} "
                             f"({was['clip']}, {was['pairs']} pairs of {', '.join(was['corpus'])}); take another --out")
        facts |= {"done": was["done"], "bad": was["bad"]}
        print(f"{out}: going on at pair {facts['done']} of {was['pairs']}")
    for name in ("pairs.jsonl", "ends.npy"):
        os.replace(out / f"new_{name}", out / name)
    corpus = Corpus(out)
    kind = args.kind if args.kind != "auto" else kind_for(len(corpus))
    facts |= {"pairs": len(corpus), "kind": kind}
    shape, mode = (len(corpus), clip.config.projection_dim), "r+" if facts["done"] else "w+"
    features = {key: np.lib.format.open_memmap(out / f"{key}.npy", mode, np.float16, shape) for key in KEYS}
    save_json(path, facts)
    for at, u, v, bad in encode(clip.to(device), tokenizer, corpus, args, dtype, facts["done"]):
        for key, part in zip(KEYS, (u, v)):
            features[key][at:at + len(part)] = part
            features[key].flush()
        facts["bad"] |= bad
        facts["done"] = at + len(u)
        save_json(path, facts)
    left_out += [(corpus[int(i)].where, why) for i, why in facts["bad"].items()]
    write_lines(out / "left_out.jsonl", left_out)
    good = readable(features["image"])
    if not len(good):
        raise ValueError(f"{out}: not one of {len(corpus)} pictures can be read; {said(left_out)}")
    for key in KEYS:
        faiss().write_index(build(features[key], good, kind), str(out / f"{key}.faiss"))
    print(f"{out}: {len(good):,} pairs, {kind}; {said(left_out)}")


def readable(u):
    """The indices of the pairs whose pictures could be read: (n,)."""
    return np.flatnonzero(np.concatenate([u[at:at + 2 ** 16].any(1) for at in range(0, len(u), 2 ** 16)]))


def kind_for(n):
    return "flat" if n < SMALL else "hnsw" if n <= LARGE else "compressed"


def build(features, good, kind):
    """A FAISS index for inner products, of the rows `good` of features (n, D), which need not fit into memory.

    OFFICIAL: autofaiss chooses; flat below 1,000, HNSW with 32 links for millions, OPQ256_768,IVF131072_HNSW32,PQ256x8 for 400
    million of 512 dimensions. The last is followed here: half a byte a dimension, about 6 sqrt(n) lists.
    """
    n, D = len(good), features.shape[1]
    lists = 2 ** max(1, round(np.log2(6 * n ** 0.5)))
    name = {"flat": "Flat", "hnsw": "HNSW32", "compressed": f"OPQ{D // 2}_{D},IVF{lists}_HNSW32,PQ{D // 2}x8"}[kind]
    index = faiss().index_factory(D, name, faiss().METRIC_INNER_PRODUCT)
    if not index.is_trained:
        some = np.sort(np.random.default_rng(0).permutation(n)[:max(40 * lists, 20_000)])
        index.train(np.asarray(features[good[some]], np.float32))
    for at in range(0, n, 2 ** 16):
        index.add(np.asarray(features[good[at:at + 2 ** 16]], np.float32))
    return index


def search(index, queries, k):
    """The k nearest of each query (Q, D) float32: similarities and numbers, (Q, k); -1 is none."""
    space = faiss().ParameterSpace()
    if isinstance(index, faiss().IndexHNSW):
        space.set_index_parameter(index, "efSearch", 64 * k)                 # thorough: queries are few beside the pairs
    elif not isinstance(index, faiss().IndexFlat):
        space.set_index_parameter(index, "nprobe", 64)
    return index.search(queries, min(k, index.ntotal))


# ---------------------------------------------------------------------------------------------------------------------
# Queries and what they hit


@dataclass(frozen=True)
class Retrieve:
    index: str                          # an index folder
    clip: str                           # the CLIP that it was made with
    classes: str                        # text file, a class name a line
    templates: str                      # text file, a template a line: a photo of a {}.
    out: str                            # folder for retrieved.jsonl, report.json and grid.png
    keys: list[str] = ("image",)        # image (T2I), text (T2T), or both
    k: int = 50                         # COURSE: pairs a query; the retrieval-size row
    min_score: float = None             # leave out what is less similar than this to the query
    device: str = "auto"                # cuda, mps or cpu


def read_lines(path, what):
    """The lines of a text file, each once."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; {what} are a text file, one a line")
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no {what} in it")
    if twice := [line for line, n in Counter(lines).items() if n > 1]:
        raise ValueError(f"{path}: {len(twice)} of its {what} stand there twice, e.g. {twice[0]!r}")
    return lines


def read_templates(path):
    lines = read_lines(path, "templates")
    if bad := [line for line in lines if line.count("{}") != 1]:
        raise ValueError(f"{path}: {bad[0]!r} is no template; it has one {{}} where the class name stands")
    return lines


def queries_of(classes, templates):
    """Every class in every template (Diss. Eq. 2.1): [(class, template's number, query), ...]; ImageNet has 1000 x 80."""
    return [(name, t, template.replace("{}", name)) for name in classes for t, template in enumerate(templates)]


@torch.inference_mode()
def texts_of(clip, tokenizer, texts, batch_size=256):
    """v (texts, D) float32, of length 1."""
    parts = [clip.texts(tokenise(texts[at:at + batch_size], tokenizer, clip.config.text_config).to(clip.device))
             for at in range(0, len(texts), batch_size)]
    return torch.cat(parts)


def open_index(folder):
    """(what index.json says, Corpus, indices of the readable pairs); ValueError if the folder is not whole or not of its
    corpus any more."""
    path = os.path.join(folder, "index.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder}: no index.json; an index is the --out folder of react.py index")
    facts, corpus = json.loads(Path(path).read_text()), Corpus(folder)
    if facts["done"] < facts["pairs"] or not os.path.isfile(os.path.join(folder, "text.faiss")):
        raise ValueError(f"{folder}: {facts['done']} of {facts['pairs']} pairs are encoded; the same react.py index goes on")
    now = {source: os.path.getsize(source) if os.path.isfile(source) else None for source in facts["sizes"]}
    if changed := [source for source, size in facts["sizes"].items() if now[source] != size]:
        raise ValueError(f"{folder} is not of this corpus: {changed[0]} had {facts['sizes'][changed[0]]} bytes when it was "
                         f"indexed, and now {now[changed[0]] or 'is gone'}; index it again")
    u = np.load(os.path.join(folder, "image.npy"), mmap_mode="r")
    if len(corpus) != facts["pairs"] or len(u) != facts["pairs"]:
        raise ValueError(f"{folder}: {len(corpus)} pairs, {len(u)} features, and index.json tells of {facts['pairs']}; the "
                         "files do not belong together: index again")
    return facts, corpus, readable(u)


def retrieve(args):
    """The pairs nearest to class names x templates (Diss. Eqs. 2.1-2.3), each once, with the queries that hit it."""
    if unknown := set(args.keys) - KEYS.keys():
        raise ValueError(f"--keys {' '.join(sorted(unknown))}: image (T2I), text (T2T), or both")
    classes, templates, out = read_lines(args.classes, "class names"), read_templates(args.templates), Path(args.out)
    facts, corpus, good = open_index(args.index)
    clip, tokenizer = load_clip(args.clip)
    if fingerprint(clip) != facts["fingerprint"]:
        raise ValueError(f"--clip {args.clip} is not the model that {args.index} has features of, which was {facts['clip']}")
    queries = queries_of(classes, templates)
    v = texts_of(clip.to(choose_device(args.device)), tokenizer, [query for *_, query in queries]).cpu().numpy()   # (Q, D)
    hits = {}                                            # {pair: {class: [(template, key, score), ...]}}
    for key in args.keys:
        searched = faiss().read_index(os.path.join(args.index, f"{key}.faiss"))
        if (searched.ntotal, searched.d) != (len(good), v.shape[1]):
            raise ValueError(f"{args.index}: {key}.faiss has {searched.ntotal} vectors of {searched.d} dimensions for "
                             f"{len(good)} pairs of {v.shape[1]}; it belongs to another index")
        for (name, t, _), scores, found in zip(queries, *search(searched, v, args.k)):
            for score, i in zip(scores.tolist(), found):
                if i >= 0 and (args.min_score is None or score >= args.min_score):
                    hits.setdefault(int(good[i]), {}).setdefault(name, []).append((t, key, round(score, 4)))
    counts = Counter(name for by_class in hits.values() for name in by_class)
    if without := [name for name in classes if not counts[name]]:
        raise ValueError(f"{len(without)} of {len(classes)} classes have no pair at all, e.g. {without[:5]}; "
                         "a lower --min_score, other names or templates, or a larger corpus")
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "retrieved.jsonl", [{"pair": i, "hits": hits[i]} for i in sorted(hits)])
    best = lambda i, name: max(score for *_, score in hits[i][name])
    of = {name: sorted((i for i in hits if name in hits[i]), key=lambda i: -best(i, name)) for name in classes}
    keys, sizes = [KEYS[key] for key in args.keys], sorted(counts.values())
    report = {"index": args.index, "crc": facts["crc"], "clip": args.clip, "keys": keys, "k": args.k,
              "queries": len(queries), "pairs": len(hits), "corpus": len(good), "min_score": args.min_score, "classes": {
                  name: {"pairs": len(of[name]), "mean_score": round(float(np.mean([best(i, name) for i in of[name]])), 4),
                         "best": [corpus[i].text for i in of[name][:3]]} for name in classes}}
    save_json(out / "report.json", report)
    draw_grid(out / "grid.png", {name: [corpus[i] for i in of[name][:6]] for name in classes[:12]})
    print(f"{out}: {len(queries):,} queries ({len(classes)} classes x {len(templates)} templates) hit {len(hits):,} of "
          f"{len(good):,} pairs ({' and '.join(keys)}, k {args.k}); a class has {sizes[0]} to {sizes[-1]}, "
          f"median {sizes[len(sizes) // 2]}")


def draw_grid(path, rows):
    """The best pairs of some classes, as pictures with their texts: look at them, for retrieval decides what can be learnt."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(rows), 6, figsize=(12, 2.3 * len(rows)), squeeze=False, layout="constrained")
    for line, (name, pairs) in zip(axes, rows.items()):
        line[0].text(-0.1, 0.5, name, transform=line[0].transAxes, rotation=90, ha="right", va="center")
        for ax in line:
            ax.axis("off")
        for ax, pair in zip(line, pairs):
            ax.imshow(pair.picture())
            ax.set_title(pair.text[:40], fontsize=7)
    fig.savefig(path, dpi=70)
    plt.close(fig)
