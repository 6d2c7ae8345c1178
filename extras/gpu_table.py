"""
What a GPU does, in nine minutes: one table for docs/unmeasured.md.

    bash runs/gpu.sh                     is python -m extras.gpu_table --out out/gpu.md

No network, no data: random weights at real shapes, lengths like the published data's. Every row is
a process of its own, in which transformers' loop or `generate` runs behind ours; one that fails, or
lacks memory or time, says so in its row. Equal losses and tokens are extras/bench.py's to hold.
"""
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaForConditionalGeneration

from extras import bench
from parts import checkpoints, lora
from parts.files import ROOT, run_main, typed_flags
from parts.ranks import Machine, choose_device
from parts.run import peak_memory

# dense bf16 FLOP/s and bytes/s of memory, by a part of the GPU's name
PEAKS = {"A100-SXM4-80": (312e12, 2.04e12), "A100": (312e12, 1.56e12), "H200": (989e12, 4.8e12),
         "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12), "B200": (2250e12, 8e12)}
COLUMNS = ("s", "tokens/s", "MFU or bandwidth", "peak GB", "attention", "beside ours")
WAYS = ("full", "lora", "frozen")        # of stage 2; frozen is stage 1: W alone trains
FULL_7B = 130e9                          # bytes of a GPU on which all of 7B trains
ROW_SECONDS = 120                        # after which a row is given up


@dataclass(frozen=True)
class Config:
    out: str = "out/gpu.md"
    minutes: float = 9.0                # no row begins when they are over, and none outlasts them
    sizes: list[str] = ("0.6b", "7b")   # of f_phi
    samples: int = 16                   # of a step, all at once
    repeats: int = 8                    # timed steps of a row
    new_tokens: int = 128               # of an answer
    answers: int = 16                   # at once, after one alone
    compile: bool = True                # every row with --compile, too


def plan_rows(config, memory):
    """[{a row's settings}, ...], those that matter most first."""
    rows = []
    for size in config.sizes:
        ways = [way for way in WAYS if way != "full" or size != "7b" or memory >= FULL_7B]
        rows += [{"job": "train", "size": size, "way": way} for way in ways]
        at_once = sorted({1, config.answers})
        rows += [{"job": "answer", "size": size, "at_once": n} for n in at_once]
    rows.sort(key=lambda row: row["size"] != "7b")       # the large model's come first
    modes = (False, True)[:1 + config.compile]           # and both modes of a row together
    return [{"job": "pictures"}, *(row | {"compiled": mode} for row in rows for mode in modes)]


# -----------------------------------------------------------------------------
# What a row computes with


def random_model(size, device, dtype):
    """A LLaVA of random weights, made where it computes."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = bench.random_llava(bench.Config(size=size))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def theirs_of(model, machine, stage=2):
    """transformers' model of that shape, its weights random and others."""
    config = checkpoints.llava_config(model.g.config, model.f_phi.config, machine.dtype, -2,
                                      "linear", model.meta)
    config.image_token_index = model.image_id
    with torch.device(machine.device):
        theirs = LlavaForConditionalGeneration(config)
    return bench.set_their_stage(theirs, stage, machine)


def flops_of(model, way, batches):
    """FLOPs of a step: 2 a weight and token forward, as many for gradients that pass, and for those
    of weights that train; attention in full, without causality; nothing twice."""
    text = model.f_phi.config
    passes = 3 if way == "full" else 2
    layers = sum(p.numel() for p in model.f_phi.base_model.layers.parameters())
    vision = sum(p.numel() for p in model.g.encoder.layers[:model.n_used_layers].parameters())
    total = 0
    for batch in batches:
        B, T = batch["input_ids"].shape
        answers = bench.count_answer_tokens([batch])
        attention = 3 * 4 * B * T * T * text.hidden_size * text.num_hidden_layers
        of_text = layers * B * T + text.hidden_size * text.vocab_size * answers
        of_pictures = vision * (len(batch["visual_index"]) + len(batch["X_v"]))
        total += 2 * passes * of_text + attention + 2 * of_pictures
    return total


def chosen_kernel(turn):
    """Which kernel a turn's attention takes, of those that torch chooses from."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        turn()
    names = " ".join(event.key for event in found.key_averages())
    kinds = ("flash", "efficient", "cudnn", "math")
    chosen = [kind for kind in kinds if f"_scaled_dot_product_{kind}_attention" in names]
    return " and ".join(chosen) or "-"


def peaks_of(device):
    """(FLOP/s, bytes/s) of a GPU that is known, else (nan, nan)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peaks for part, peaks in PEAKS.items() if part in name), (np.nan, np.nan))


def after_warming_up(turn, numbers):
    """What turns tell, as arrays, after others that warm up."""
    for k in range(bench.WARM):
        turn(k)
    return bench.to_arrays([turn(k) for k in numbers])


def table_cells(seconds, speed, share, device, attention="-"):
    """What a row of the table says, as text."""
    return {"s": f"{seconds:.4g}", "tokens/s": f"{speed:,.0f}",
            "MFU or bandwidth": "-" if np.isnan(share) else f"{share:.1%}",
            "peak GB": f"{peak_memory(device) / 1e9:.1f}", "attention": attention}


def train_row(config, row):
    """A training step of a way, eager or compiled; beside it transformers' loop, eager."""
    machine = Machine()
    stage = 1 if row["way"] == "frozen" else 2
    settings = bench.Config(size=row["size"], stage=stage, global_batch_size=config.samples,
                            micro_batch_size=config.samples, repeats=config.repeats,
                            compile=row["compiled"])
    model = random_model(row["size"], machine.device, machine.dtype)
    model.set_stage(stage)
    if row["way"] == "lora":
        lora.adapt(model, 128, had_newline=False)
    large = row["size"] == "7b" and row["way"] == "full"
    turn = bench.our_steps(settings, machine, model, "all" if large else "none")
    numbers = range(bench.WARM, bench.WARM + config.repeats)
    kernel = "-" if row["compiled"] else chosen_kernel(partial(turn, 0))
    found = after_warming_up(turn, numbers)
    seconds = np.median(found["seconds"])
    speed = found["real"].sum() / found["seconds"].sum()
    drawn = bench.draw_batches(model, settings, in_order=True)
    batches = [batch for k in numbers for batch in drawn[k]]
    share = flops_of(model, row["way"], batches) / config.repeats / peaks_of(machine.device)[0]
    cells = table_cells(seconds, speed, share / seconds, machine.device, kernel)
    if row["compiled"] or row["way"] == "lora" or large:
        return cells
    batches = bench.draw_batches(model, settings, in_order=False)
    del turn
    model.f_phi.to("meta")               # ours makes room for theirs
    gc.collect()
    theirs = bench.their_steps(machine, theirs_of(model, machine, stage).train(), batches)
    other = after_warming_up(theirs, numbers)
    ratio = (other["seconds"].sum() / other["real"].sum()) * speed
    return cells | {"beside ours": f"transformers' loop {ratio:.2f} x the time"}


@torch.no_grad()
def answer_row(config, row):
    """Greedy answers, eager or compiled; beside them transformers' generate."""
    machine = Machine()
    settings = bench.Config(size=row["size"], micro_batch_size=row["at_once"],
                            new_tokens=config.new_tokens)
    model = random_model(row["size"], machine.device, machine.dtype)
    n_bytes = sum(p.nbytes for p in model.f_phi.base_model.layers.parameters())
    n_bytes += model.f_phi.get_output_embeddings().weight.nbytes
    turn = bench.engine_answers(settings, machine, model, row["compiled"])
    times = after_warming_up(turn, range(3))["seconds"]
    step = np.median(times) / (config.new_tokens - 1)
    share = n_bytes / step / peaks_of(machine.device)[1]
    cells = table_cells(step, row["at_once"] / step, share, machine.device)
    if row["compiled"]:
        return cells
    theirs = theirs_of(model, machine).to(machine.dtype).eval()
    prompts = bench.draw_prompts(model, settings)
    other = bench.generate_answers(settings, machine, theirs, prompts, model.image_id)
    ratio = np.median(after_warming_up(other, range(3))["seconds"]) / np.median(times)
    return cells | {"beside ours": f"transformers' generate {ratio:.2f} x the time"}


def pictures_row(config, row):
    """Pictures read and preprocessed by one core, beside transformers' processor."""
    return {"beside ours": bench.picture_speed(repeats=3)}


ROWS = {"train": train_row, "answer": answer_row, "pictures": pictures_row}


# -----------------------------------------------------------------------------
# The table


def line_of(row, config, seconds):
    """A row of the table, as a process of so many seconds at most found it."""
    name = " ".join(str(value) for key, value in row.items() if key != "compiled")
    if row.get("compiled"):
        name += " --compile"
    job = json.dumps({"config": asdict(config), "row": row})
    try:
        done = subprocess.run([sys.executable, "-m", "extras.gpu_table", "row", job], cwd=ROOT,
                              capture_output=True, text=True, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        cells = {"s": "no time was left"}
    else:
        shown = done.stderr if done.returncode else done.stdout
        last = shown.strip().splitlines()[-1]
        cells = {"s": f"failed: {last[:120]}"} if done.returncode else json.loads(last)
    return "| ".join([f"| {name} ", *(f"{cells.get(column, '')} " for column in COLUMNS), ""])


def write_rows(config):
    """All rows that the minutes allow, one after another, into --out and on the terminal."""
    began = time.monotonic()
    device = choose_device()
    memory, hardware = 0, platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory, hardware = properties.total_memory, f"{properties.name}, CUDA {torch.version.cuda}"
    head = [f"{hardware}, {memory / 1e9:.0f} GB; torch {torch.__version__}, transformers "
            f"{transformers.__version__}; {time.strftime('%Y-%m-%d')}; `{' '.join(sys.argv)}`, "
            "random weights", "", f"| row | {' | '.join(COLUMNS)} |", "|" + " --- |" * 7]
    os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
    with open(config.out, "w") as f:
        print(*head, sep="\n", file=f)
        for row in plan_rows(config, memory):
            left = 60 * config.minutes - (time.monotonic() - began)
            line = line_of(row, config, min(left, ROW_SECONDS))
            print(line, flush=True)
            print(line, file=f, flush=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] != ["row"]:
        return write_rows(Config(**typed_flags(Config, argv, __doc__)))
    job = json.loads(argv[1])
    cells = ROWS[job["row"]["job"]](Config(**job["config"]), job["row"])
    print(json.dumps(cells))             # of a row's process: its cells as the last line


if __name__ == "__main__":
    run_main(main)
