"""What 158,000 samples cost to check and tokenise, in every form that data may have.

    python tests/soak_forms.py --samples 158000 --forms llava messages urls parquet tar

Writes one file after the other into a temporary folder, of records as long as LLaVA-Instruct's and
photographs' sizes, runs `python data.py stats` on each in one process, and prints CPU seconds and
the peak of its memory.
"""
import base64
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from parts.files import run_main, typed_flags, write_lines  # noqa: E402

DISTINCT = 200                 # pictures; their bytes repeat
LLM = ROOT / "toy" / "pretrained" / "llm"


@dataclass(frozen=True)
class Config:
    samples: int = 158000
    forms: list[str] = ("llava", "messages", "urls", "parquet", "tar")    # which
    folder: str = None         # for the files; a temporary one


def photograph(rng):
    """256 x 192 pixels of soft colours with some grain: about 9 KB of JPEG."""
    soft = rng.integers(0, 256, (12, 16, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(soft).resize((256, 192), Image.Resampling.BICUBIC), float)
    pixels = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def conversations(config):
    """Yield (index, turns): one to four questions and about 210 words of answers, 1.4 KB in all."""
    rng = random.Random(0)
    vocabulary = json.loads((LLM / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word.strip("Ġ▁") for word in vocabulary if word.strip("Ġ▁").isalpha()]
    for i in range(config.samples):
        n = rng.choice([1, 1, 4])
        turns = []
        for turn in range(n):
            question = " ".join(rng.choices(words, k=9)) + "?"
            turns.append({"from": "human", "value": "<image>\n" * (turn == 0) + question})
            turns.append({"from": "gpt", "value": " ".join(rng.choices(words, k=210 // n)) + "."})
        yield i, turns


def as_messages(turns, picture):
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn["value"]}
                for i, turn in enumerate(turns)]
    text = {"type": "text", "text": turns[0]["value"].removeprefix("<image>\n")}
    return [{"role": "user", "content": [picture, text]}, *messages[1:]]


def write_form(form, config, pictures, folder):
    """The file of a form; picture i is pictures[i % DISTINCT]."""
    path = folder / f"x.{'jsonl' if form in ('messages', 'urls') else form}"
    samples = conversations(config)
    if form == "llava":
        rows = [{"id": i, "image": f"{i % DISTINCT}.jpg", "conversations": t} for i, t in samples]
        path.write_text(json.dumps(rows))
    elif form == "messages":
        write_lines(path, ({"images": [f"{i % DISTINCT}.jpg"], "messages": as_messages(
            t, {"type": "image"})} for i, t in samples))
    elif form == "urls":
        urls = ["data:image/jpeg;base64," + base64.b64encode(p).decode() for p in pictures]
        write_lines(path, ({"messages": as_messages(t, {"type": "image_url", "image_url": {
            "url": urls[i % DISTINCT]}})} for i, t in samples))
    elif form == "parquet":
        import pyarrow
        import pyarrow.parquet
        writer = None
        rows = []
        for i, turns in samples:
            picture = {"bytes": pictures[i % DISTINCT], "path": f"{i}.jpg"}
            rows.append({"id": str(i), "conversations": turns, "image": picture})
            if len(rows) == 100 or i == config.samples - 1:      # as the hub's row groups
                table = pyarrow.Table.from_pylist(rows)
                writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
                writer.write_table(table)
                rows = []
        writer.close()
    else:
        with tarfile.open(path, "w") as tar:
            for i, turns in samples:
                record = json.dumps({"conversations": turns}).encode()
                for name, content in ((f"{i:06}.jpg", pictures[i % DISTINCT]),
                                      (f"{i:06}.json", record)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


def main(argv=None):
    config = Config(**typed_flags(Config, argv, __doc__))
    rng = np.random.default_rng(0)
    pictures = [photograph(rng) for _ in range(DISTINCT)]
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        folder = Path(folder)
        for i, picture in enumerate(pictures):
            (folder / f"{i}.jpg").write_bytes(picture)
        for form in config.forms:
            path = write_form(form, config, pictures, folder)
            size = path.stat().st_size
            process = subprocess.Popen([
                sys.executable, ROOT / "data.py", "stats", path, "--images", folder, "--llm", LLM,
                "--template", "llava_v0", "--workers", "0"], stdout=subprocess.PIPE, text=True)
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = usage.ru_utime + usage.ru_stime
            print(f"{form:<10}{size / 1e9:8.2f} GB of file{seconds:10.0f} CPU seconds"
                  f"{usage.ru_maxrss / 1e6:8.2f} GB at the peak, exit {status}", flush=True)
            print("\n".join(said.splitlines()[-9 if status else -1:]), flush=True)
            path.unlink()


if __name__ == "__main__":
    run_main(main)
