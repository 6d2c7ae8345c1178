"""
How fast, and in how much memory: this code beside what one would run otherwise.

    python -m extras.bench train --size 135m --stage 2     seconds and memory of a training step
    python -m extras.bench generate --size 135m            tokens a second of greedy answers
    python -m extras.bench data                            padding; pictures a second
    python -m extras.bench index                           REACT's retrieval: recall, seconds

Beside us stands transformers' LlavaForConditionalGeneration, in the loop that a careful user would
write (padded batches in random order, labels, AdamW), and, with --beside DIR, another checkout of
this project. Every contestant is a process of its own, and they take turns. They start from the
same weights and samples, and no time is printed unless losses, or tokens, are equal. A ratio is the
median over neighbouring turns, with its range. Weights and pixels are random, lengths look like
those of the published data (`draw_lengths`). Figures: docs/speed.md.
"""
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from data import collate, micro_batches, plan_epoch
from extras import retrieve
from model import IGNORE, IMAGE, LLaVA
from parts.engine import Engine
from parts.files import ROOT, check_least, run_command, run_main
from parts.gated import VisionTower
from parts.pictures import load_image
from parts.ranks import DTYPES, Machine, Optimizer, groups_of
from parts.run import peak_memory
from parts.views import preprocess, view_of
from train import accumulate, count_answer_tokens

VIT_L = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=224,
             patch_size=14, num_hidden_layers=24)
TOY_VIT = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, image_size=64,
               patch_size=16, num_hidden_layers=2)
SIZES = {                                                # f_phi's shape
    "toy": dict(vocab_size=741, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                num_attention_heads=8, tie_word_embeddings=True),
    "135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),  # SmolLM2
    "7b": dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32),                                                    # Vicuna
}
BATCHES = {                              # samples a step, and at once, of stage 1 and of stage 2
    "toy": [(8, 8), (32, 32)],
    "135m": [(16, 16), (8, 8)],
    "7b": [(32, 16), (16, 4)],
}
WARM = 2                                 # turns before the clock starts: they compile
LEVERS = ("all logits", "random batches", "not compiled")    # one of our ways is left out


@dataclass(frozen=True)
class Config:
    size: str = "135m"                  # toy with its g; of the others, grid features are given
    stage: int = 2
    global_batch_size: int = None       # samples a step
    micro_batch_size: int = None        # samples at once
    repeats: int = 5                    # timed turns of each contestant, after some to warm up
    levers: bool = False                # also time what each of our ways brings, by leaving it out
    compile: bool = True                # ours trains with train.py --compile
    beside: str = None                  # another checkout of this project
    new_tokens: int = 64                # of generate
    seed: int = 0
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32

    CHOICES: ClassVar[dict] = {"size": list(SIZES), "stage": [1, 2], "dtype": ["auto", *DTYPES]}

    @property
    def is_toy(self):
        return self.size == "toy"


def complete(config):
    """The configuration with the batches of its size. Raises ValueError if they do not divide."""
    check_least(config, global_batch_size=1, micro_batch_size=1, repeats=1, new_tokens=2)
    samples, at_once = BATCHES[config.size][config.stage - 1]
    samples = config.global_batch_size or samples
    at_once = min(config.micro_batch_size or at_once, samples)
    if samples % at_once:
        raise ValueError(f"--micro_batch_size {at_once} does not divide --global_batch_size "
                         f"{samples}")
    return replace(config, global_batch_size=samples, micro_batch_size=at_once)


# -----------------------------------------------------------------------------
# What all contestants get


def random_llava(config):
    """A LLaVA of that size with random weights; where features are given, with little of g."""
    torch.manual_seed(config.seed)
    f_phi = AutoModelForCausalLM.from_config(LlamaConfig(
        **SIZES[config.size], max_position_embeddings=4096, bos_token_id=1, eos_token_id=1,
        pad_token_id=0))
    shape = TOY_VIT if config.is_toy else {**VIT_L, "num_hidden_layers": 2}
    g = VisionTower(CLIPVisionConfig(**shape))
    # ids are drawn, not read, so there are no words
    words = models.WordLevel({"<unk>": 0, "</s>": 1, IMAGE: 2}, "<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>",
                                        eos_token="</s>", pad_token="<unk>")
    tokenizer.add_tokens([AddedToken(IMAGE, special=True)])
    return LLaVA(g, f_phi, tokenizer, meta={"template": "plain", "aspect": "crop"})


class GivenFeatures(nn.Module):
    """In the place of g: it hands on Z_v, which then stands in the place of the pixels."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.pre_layrnorm = self.post_layernorm = nn.Identity()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList()

    def embeddings(self, Z_v):
        return F.pad(Z_v, (0, 0, 1, 0))  # with a CLS, which is dropped again

    def forward(self, Z_v, **_):
        return SimpleNamespace(hidden_states=(self.embeddings(Z_v),) * 3)


def draw_lengths(size, stage, rng):
    """[(tokens of a question, of its answer), ...] of one sample.

    OURS: drawn to look like LLaVA-Pretrain's captions in stage 1, and in stage 2 like
    LLaVA-Instruct's 58K conversations, 23K descriptions and 77K reasonings. The toy's are its own.
    """
    def near(mean, deviation, least, most):
        return int(np.clip(rng.normal(mean, deviation), least, most))

    if size == "toy":
        if stage == 1 or rng.random() < 0.37:
            return [(9, near(16, 7, 4, 35))]
        return [(9, near(8, 6, 3, 20)) for _ in range(rng.integers(2, 9))]
    if stage == 1:
        return [(12, int(np.clip(rng.lognormal(2.5, 0.45), 5, 60)))]
    kind = rng.integers(158)
    if kind < 58:
        return [(14, near(24, 10, 5, 60)) for _ in range(rng.integers(2, 7))]
    if kind < 81:
        return [(14, near(125, 30, 50, 250))]
    return [(20, near(145, 40, 60, 300))]


def draw_lengths_of_batches(config, N, *numbers):
    """`draw_lengths` of the samples of so many global batches, for each of `numbers`.

    They are of those that `plan_epoch` makes of 20,000 samples, evenly spread over short and long.
    """
    rng = np.random.default_rng(config.seed)
    drawn = [draw_lengths(config.size, config.stage, rng) for _ in range(20_000)]
    prompt = prompt_tokens(config)
    lengths = np.array([N + prompt + sum(map(sum, sample)) for sample in drawn])
    plan = plan_epoch(lengths, config.global_batch_size, config.seed, 0)[:-1]
    plan.sort(key=lambda batch: lengths[batch].sum())
    samples = []
    for n in numbers:
        for i in rng.permutation(n):
            batch = plan[int((i + 0.5) / n * len(plan))]
            samples += [drawn[j] for j in batch[np.argsort(lengths[batch])]]
    return samples


def prompt_tokens(config):
    """Tokens of the system message and the roles."""
    return 20 if config.is_toy else 40


def random_sample(model, config, lengths, rng):
    """A sample of those lengths: random ids behind a random picture, or behind its features."""
    g = model.g.config
    N = (g.image_size // g.patch_size) ** 2
    ids = [model.image_id] * N
    labels = [IGNORE] * N
    for question, answer in [(prompt_tokens(config), 0), *lengths]:
        new = rng.integers(3, model.f_phi.config.vocab_size, question + answer).tolist()
        ids += new
        labels += [IGNORE] * question + new[question:]
    shape = (1, 3, g.image_size, g.image_size) if config.is_toy else (1, N, g.hidden_size)
    X_v = torch.from_numpy(rng.standard_normal(shape, np.float32))
    return {"where": "", "input_ids": ids, "labels": labels, "pictures": [], "X_v": X_v}


def to_batch(model, samples, side="right"):
    """`collate`, with the random pictures of `random_sample`, one a sample."""
    view = view_of("crop", model.g.config.image_size, model.g.config.patch_size)
    X_v = torch.cat([sample["X_v"] for sample in samples])
    visual_index = torch.arange(len(samples) * view.N)
    return collate(samples, view, side) | {"X_v": X_v, "visual_index": visual_index}


def draw_batches(model, config):
    """[{"bucketed": micro-batches, "random": ...}, ...]: WARM of them, then --repeats.

    The timed samples are the same in both orders: as training plans them, and shuffled.
    """
    rng = np.random.default_rng(config.seed)
    G, micro = config.global_batch_size, config.micro_batch_size
    N = (model.g.config.image_size // model.g.config.patch_size) ** 2
    drawn = draw_lengths_of_batches(config, N, WARM, config.repeats)
    samples = [random_sample(model, config, lengths, rng) for lengths in drawn]
    warm = WARM * G
    shuffled = [*range(warm), *(warm + rng.permutation(len(samples) - warm))]
    orders = {"bucketed": samples, "random": [samples[i] for i in shuffled]}
    batches = []
    for start in range(0, len(samples), G):
        batch = {}
        for name, ordered in orders.items():
            parts = [ordered[i:i + micro] for i in range(start, start + G, micro)]
            batch[name] = [to_batch(model, part) for part in parts]
        batches.append(batch)
    return batches


# -----------------------------------------------------------------------------
# Turns. Each function below prepares a contestant and returns turn(way, k) -> what is reported.


def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report_of(loss, seconds, batch):
    """What a training turn tells: its loss per answer token, its time, and its tokens."""
    real = sum(b["attention_mask"].sum().item() for b in batch)
    padded = sum(b["attention_mask"].numel() for b in batch)
    return {"loss": loss, "seconds": seconds, "real": real, "padded": padded,
            "answers": count_answer_tokens(batch)}


def our_training(config, weights):
    """train.py's own step. Rates are 0, so that all steps are of equal weights."""
    machine = Machine(config.device, config.dtype)
    model = LLaVA.from_pretrained(weights)
    batches = draw_batches(model, config)
    if not config.is_toy:
        model.g = GivenFeatures(model.g.config)
    model.set_stage(config.stage)
    theta = machine.place(model, compile=config.compile)
    optimizer = Optimizer(groups_of(theta, {"W": 0.0, "f_phi": 0.0}), machine)
    optimizer.set_lr(1.0)

    def every_logit(input_ids, labels, **pictures):
        H = model.splice(input_ids, **pictures)
        logits = model.f_phi(inputs_embeds=H, use_cache=False).logits    # (B, T, V)
        targets = labels[:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
        return loss, None

    def turn(way, k):
        batch = batches[k]["random" if way == "random batches" else "bucketed"]
        run = every_logit if way == "all logits" else model
        began = clock(machine.device)
        with torch.compiler.set_stance("force_eager" if way == "not compiled" else "default"):
            loss = accumulate(run, batch, machine, optimizer, count_answer_tokens(batch))
        optimizer.step()
        return report_of(loss, clock(machine.device) - began, batch)
    return turn


def their_model(config, weights, machine):
    """transformers' model from our checkpoint, in fp32 what trains, the rest as it computes."""
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
    if not config.is_toy:
        model.model.vision_tower = GivenFeatures(model.model.vision_tower.config)
    model.requires_grad_(config.stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else machine.dtype)
    return model.to(machine.device)


def their_training(config, weights):
    """The loop that a careful user would write, with the right mean over the global batch."""
    machine = Machine(config.device, config.dtype)
    batches = draw_batches(LLaVA.from_pretrained(weights), config)
    model = their_model(config, weights, machine).train()
    trains = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trains, lr=0.0, weight_decay=0.0)

    def turn(way, k):
        batch = batches[k]["random"]
        n_answer, total = count_answer_tokens(batch), 0.0
        began = clock(machine.device)
        adamw.zero_grad()
        for b in batch:
            inputs = {name: b[name].to(machine.device)
                      for name in ("input_ids", "attention_mask", "labels")}
            with machine.forward(model):
                loss = model(**inputs, pixel_values=b["X_v"].to(machine.device),
                             num_items_in_batch=n_answer, use_cache=False).loss
            loss.backward()
            total += loss.item()
        adamw.step()
        return report_of(total, clock(machine.device) - began, batch)
    return turn


def draw_prompt(model, config, n):
    """n questions at once, padded on the left."""
    rng = np.random.default_rng([config.seed, n])
    samples = [random_sample(model, config, [(int(rng.integers(5, 30)), 0)], rng) for _ in range(n)]
    return to_batch(model, samples, side="left")


def time_answers(answer, new_tokens, device):
    """Seconds to the first token, seconds of those behind it, and the ids of answer(n tokens)."""
    began = clock(device)
    answer(1)
    first = clock(device) - began
    ids = answer(new_tokens)
    return {"first": first, "seconds": clock(device) - began - 2 * first, "ids": ids}


@torch.no_grad()
def our_answers(config, weights):
    """sample.py's engine."""
    machine = Machine(config.device, config.dtype)
    model = LLaVA.from_pretrained(weights, machine.dtype)
    batches = {n: draw_prompt(model, config, n) for n in (1, config.micro_batch_size)}
    if not config.is_toy:
        model.g = GivenFeatures(model.g.config)
    engine = Engine(model.to(machine.device).eval())

    def turn(way, k):
        def answer(n):
            steps = engine.stream(batches[way], max_new_tokens=n)
            return list(zip(*steps, strict=True))
        return time_answers(answer, config.new_tokens, machine.device)
    return turn


@torch.no_grad()
def their_answers(config, weights):
    """transformers' generate."""
    machine = Machine(config.device, config.dtype)
    model = LLaVA.from_pretrained(weights)
    batches = {n: draw_prompt(model, config, n) for n in (1, config.micro_batch_size)}
    theirs = their_model(config, weights, machine).to(machine.dtype).eval()

    def turn(way, k):
        batch = batches[way]
        T = batch["input_ids"].shape[1]

        def answer(n):
            ids = theirs.generate(
                input_ids=batch["input_ids"].to(machine.device),
                attention_mask=batch["attention_mask"].to(machine.device),
                pixel_values=batch["X_v"].to(machine.device, machine.dtype), max_new_tokens=n,
                do_sample=False, suppress_tokens=[model.image_id])
            return ids[:, T:].tolist()
        return time_answers(answer, config.new_tokens, machine.device)
    return turn


CONTESTANTS = {
    "train": {"ours": our_training, "transformers": their_training},
    "generate": {"ours": our_answers, "transformers": their_answers},
}


# -----------------------------------------------------------------------------
# Processes that take turns


class Contestant:
    """A process, in one checkout, that measures a turn when it is asked."""

    def __init__(self, checkout, job):
        self.process = subprocess.Popen([sys.executable, "-m", "extras.bench", "turns"], text=True,
                                        cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.checkout = checkout
        self.peak = self.ask(job)["peak"]

    def ask(self, message):
        """Send a line of JSON and wait for one."""
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"a contestant of {self.checkout} failed; its error stands above")
        return json.loads(line)

    def turn(self, way, k):
        reply = self.ask([way, k])
        self.peak = reply["peak"]
        return reply

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def take_turns(argv=None):
    """What a contestant's process does: it reads a job, then turns, a line each, and replies."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                        # what libraries print is no reply
    job = json.loads(sys.stdin.readline())
    prepare = CONTESTANTS[job["command"]][job["contestant"]]
    turn = prepare(Config(**job["config"]), job["weights"])
    device = Machine(job["config"]["device"], job["config"]["dtype"]).device
    print(json.dumps({"peak": peak_memory(device)}), file=replies, flush=True)
    for line in sys.stdin:
        reply = turn(*json.loads(line))
        print(json.dumps(reply | {"peak": peak_memory(device)}), file=replies, flush=True)


def race(command, config, rows):
    """Let contestants take turns: ({row: [reply, ...]}, {contestant: peak in bytes}).

    rows   {what stands in the table: (contestant, way)}; "beside" is ours of another checkout.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        random_llava(config).save_pretrained(folder)
        job = {"command": command, "weights": folder, "config": asdict(config)}
        contestants = {}
        for name, _ in rows.values():
            if name not in contestants:
                checkout = config.beside if name == "beside" else ROOT
                who = "ours" if name == "beside" else name
                contestants[name] = Contestant(checkout, job | {"contestant": who})
                stack.callback(contestants[name].close)
        replies = {row: [] for row in rows}
        for k in range(WARM + config.repeats):
            for row, (name, way) in rows.items():
                replies[row].append(contestants[name].turn(way, k))
        peaks = {name: contestant.peak for name, contestant in contestants.items()}
    return {row: found[WARM:] for row, found in replies.items()}, peaks


def names_of_contestants(config):
    if config.beside:
        return ["ours", "beside", "transformers"]
    return ["ours", "transformers"]


def column(replies, key):
    return np.array([reply[key] for reply in replies])


def ratio_of(theirs, ours):
    """The median of the pairs' ratios, and their range."""
    ratio = theirs / ours
    return f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"


def bench_train(config):
    """Seconds and memory of a training step, and how many times as long as ours others take."""
    config = complete(config)
    rows = {name: (name, "") for name in names_of_contestants(config)}
    if config.levers:
        rows |= {f"ours, {way}": ("ours", way) for way in LEVERS}
    replies, peaks = race("train", config, rows)
    losses = {row: mean_loss(found) for row, found in replies.items()}
    tolerance = 2e-2 if config.dtype in ("bf16", "fp16") else 1e-4
    assert max(losses.values()) < (1 + tolerance) * min(losses.values()), f"other losses: {losses}"
    print(f"{config.size}, stage {config.stage}, {config.repeats} x {config.global_batch_size} "
          f"samples, {config.micro_batch_size} at once, {torch.get_num_threads()} threads; "
          f"loss {losses['ours']:.4f}")
    print(f"{'':<24}{'s/step':>8}{'tokens/s':>10}{'padding':>9}   time, ours = 1 (range)")
    for row, found in replies.items():
        print_row(row, found, replies["ours"])
    if not config.levers:                # they run in our process, and would be in its peak
        for name, peak in peaks.items():
            share = peaks["ours"] / peak
            print(f"peak memory, {name}: {peak / 1e9:.2f} GB; ours is {share:.2f} of it")


def print_row(row, found, ours):
    """A line of the table; times are compared per real token."""
    seconds = column(found, "seconds")
    real = column(found, "real")
    padding = 1 - real.sum() / column(found, "padded").sum()
    speed = real.sum() / seconds.sum()
    our_pace = column(ours, "seconds") / column(ours, "real")
    print(f"{row:<24}{seconds.mean():>8.3g}{speed:>10.0f}{padding:>9.1%}   "
          f"{ratio_of(seconds / real, our_pace)}")


def mean_loss(replies):
    """The loss per answer token of all timed steps."""
    return float(np.average(column(replies, "loss"), weights=column(replies, "answers")))


def bench_generate(config):
    """Greedy answers of --new_tokens tokens: tokens a second behind the first, of equal tokens."""
    config = complete(config)
    rows = {}
    for n in (1, config.micro_batch_size):
        for name in names_of_contestants(config):
            rows[f"{name}, {n} at once"] = name, n
    replies, _ = race("generate", config, rows)
    print(f"{config.size}, {config.new_tokens} tokens each; equal tokens")
    for row, found in replies.items():
        _, n = rows[row]
        ours = replies[f"ours, {n} at once"]
        assert found[-1]["ids"] == ours[-1]["ids"], f"{row}: other tokens"
        seconds = column(found, "seconds")
        first = np.median(column(found, "first"))
        speed = n * (config.new_tokens - 1) / np.median(seconds)
        ratio = ratio_of(seconds, column(ours, "seconds"))
        print(f"{row:<24}{speed:>8.1f} tokens/s behind the first, which takes {first:.3g} s; "
              f"time, ours = 1: {ratio}")


# -----------------------------------------------------------------------------
# Data


def padding_of(lengths, batches):
    """The share of padding in batches of indices."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / padded


def bench_data(config):
    """Padding of an epoch's micro-batches, on 1 and on 8 ranks; pictures a second of one core."""
    for stage, G, micro in ((1, 128, 16), (2, 32, 4), (2, 128, 16)):
        rng = np.random.default_rng(config.seed)
        samples = [draw_lengths("7b", stage, rng) for _ in range(100_000)]
        lengths = np.array([256 + 40 + sum(map(sum, sample)) for sample in samples])
        plan = plan_epoch(lengths, G, config.seed, 0)
        one, eight = (padding_of(lengths, batches_of_ranks(plan, lengths, min(micro, G // n), n))
                      for n in (1, 8))
        shuffled = padding_of(lengths, rng.permutation(len(lengths)).reshape(-1, micro))
        print(f"stage {stage}, batch {G}, micro-batch {micro}: padding {one:.2%} on 1 rank, "
              f"{eight:.2%} on 8; in random batches {shuffled:.1%}")
    bench_pictures(config)


def batches_of_ranks(plan, lengths, micro, world_size):
    """The samples of every micro-batch of every rank, without those that fill up."""
    batches = []
    for batch in plan:
        for rank in range(world_size):
            for keys in micro_batches(batch, lengths, 0, micro, world_size, rank):
                samples = [i for _, i, is_scored in keys if is_scored]
                if samples:
                    batches.append(samples)
    return batches


def bench_pictures(config, size=224, n=40):
    """A JPEG of COCO's size, read and preprocessed, beside transformers' processor."""
    square = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    noise = np.random.default_rng(config.seed).integers(0, 256, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
    torch.set_num_threads(1)             # as in a DataLoader's worker

    def ours():
        return preprocess(load_image(file), size)

    def theirs():
        return processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values[0]

    def seconds_of(function):
        began = time.perf_counter()
        for _ in range(n):
            function()
        return time.perf_counter() - began

    assert torch.equal(ours(), theirs()), "other pixels"
    times = np.array([[seconds_of(ours), seconds_of(theirs)] for _ in range(config.repeats)])
    speed = n / np.median(times[:, 0])
    print(f"JPEG of 640 x 480 to {size} x {size}: ours {speed:.0f} pictures/s a core; "
          f"CLIPImageProcessorPil takes {ratio_of(times[:, 1], times[:, 0])} times as long; "
          "equal pixels")


# -----------------------------------------------------------------------------
# REACT's retrieval


def clusters(n, queries, D=512, centres=200, seed=0):
    """Unit vectors around centres, and queries nearer to these: (n, D) float16, float32."""
    rng = np.random.default_rng(seed)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def near(count, distance):
        noise = rng.standard_normal((count, D), dtype=np.float32)
        return unit(middles[rng.integers(centres, size=count)] + distance * noise)

    middles = unit(rng.standard_normal((centres, D), dtype=np.float32))
    return near(n, 0.08).astype(np.float16), near(queries, 0.03)


def recall(index, exact, queries, k=50):
    """The share of the k nearest vectors that an index finds."""
    _, found = retrieve.search_index(index, queries, k)
    _, truth = retrieve.search_index(exact, queries, k)
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(found, truth, strict=True)])


def bench_index(config):
    """HNSW beside exact search (Diss. Ch. 2), and the time of a million vectors."""
    features, queries = clusters(200_000, 1000)
    rows = np.arange(len(features))
    exact, hnsw = (retrieve.build_index(features, rows, kind) for kind in ("flat", "hnsw"))
    print(f"{len(rows):,} vectors: recall@50 of HNSW {recall(hnsw, exact, queries):.4f}")
    del exact, hnsw
    features, queries = clusters(1_000_000, 10_000)
    began = time.perf_counter()
    index = retrieve.build_index(features, np.arange(len(features)), "hnsw")
    built = time.perf_counter()
    retrieve.search_index(index, queries, 50)
    ended = time.perf_counter()
    peak = peak_memory(torch.device("cpu"))
    print(f"{len(features):,} vectors: indexed in {built - began:.0f} s, {len(queries):,} queries "
          f"in {ended - built:.0f} s, {peak / 1e9:.1f} GB at the peak, "
          f"{torch.get_num_threads()} threads")


COMMANDS = {"train": (bench_train, Config), "generate": (bench_generate, Config),
            "data": (bench_data, Config), "index": (bench_index, Config)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["turns"]:
        return take_turns()
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
