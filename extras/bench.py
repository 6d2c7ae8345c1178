"""
How fast, and in how much memory: this code beside what one would run otherwise.

    python -m extras.bench train --size 135m --stage 2     seconds and memory of a training step
    python -m extras.bench generate --size 135m            tokens a second of greedy answers
    python -m extras.bench data                            padding; pictures a second

Beside us stands transformers' LlavaForConditionalGeneration, in the loop that a careful user would
write (padded batches in random order, labels, AdamW). Each of the two is a process of its own, and
they take turns. They start from the same weights and samples, and no time is printed unless losses,
or tokens, are equal. A ratio is the median over neighbouring turns, with its range. Weights and
pixels are random, lengths look like those of the published data (`draw_lengths`). Figures:
docs/speed.md.
"""
import io
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from data import collate, micro_batches, plan_epoch
from model import LLaVA
from parts.checkpoints import load_tokenizer
from parts.engine import Engine
from parts.files import IGNORE, ROOT, check_least, run_command, run_main
from parts.pictures import load_image
from parts.ranks import DTYPES, Machine, Optimizer, choose_device, groups_of
from parts.run import peak_memory
from parts.towers import CLIPTower
from parts.views import preprocess, view_from
from train import count_answer_tokens, update

TOY_G = dict(hidden_size=128, intermediate_size=512, image_size=64, patch_size=16)
SMALL_G = dict(hidden_size=64, intermediate_size=64, image_size=224, patch_size=14)    # 256 tokens
VIT_L = dict(hidden_size=1024, intermediate_size=4096, image_size=224, patch_size=14,
             num_hidden_layers=24, num_attention_heads=16)                   # the paper's g
TOWERS = {"toy": TOY_G, "135m": SMALL_G}                 # others have the paper's
SIZES = {                                                # f_phi's shape
    "toy": dict(vocab_size=742, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                num_attention_heads=8, tie_word_embeddings=True),
    "135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),  # SmolLM2
    "0.6b": dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                 num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True),  # Qwen3
    "7b": dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32),                                                    # Vicuna
    "13b": dict(vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                num_attention_heads=40),
    "mistral": dict(vocab_size=32064, hidden_size=4096, intermediate_size=14336,
                    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    "34b": dict(vocab_size=64064, hidden_size=7168, intermediate_size=20480, num_hidden_layers=60,
                num_attention_heads=56, num_key_value_heads=8),                            # Yi
}
WARM = 2                                 # turns before the clock starts: they compile


@dataclass(frozen=True)
class Config:
    size: str = "135m"                  # of f_phi; up to this g is small, so that f_phi's counts
    stage: int = 2
    global_batch_size: int = 8          # samples a step
    micro_batch_size: int = 8           # samples at once, of a step or of generate
    repeats: int = 5                    # timed turns of each contestant, after some to warm up
    compile: bool = True                # ours trains with train.py --compile
    new_tokens: int = 64                # of generate
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32

    CHOICES: ClassVar = {"size": list(SIZES), "stage": [1, 2], "dtype": ["auto", *DTYPES]}


# -----------------------------------------------------------------------------
# What all contestants get


def random_llava(config, projector="linear", **vision):
    """A LLaVA of that size with random weights; `vision` is what its g has otherwise."""
    torch.manual_seed(0)
    f_phi = LlamaForCausalLM(LlamaConfig(**SIZES[config.size], max_position_embeddings=4096))
    shape = TOWERS.get(config.size, VIT_L) | vision
    g = CLIPTower(CLIPVisionConfig(**dict(num_attention_heads=4, num_hidden_layers=2) | shape))
    tokenizer = load_tokenizer(str(ROOT / "toy/pretrained/llm"))
    return LLaVA(g, f_phi, tokenizer, projector=projector,
                 meta={"template": "plain", "aspect": "crop"})


def draw_lengths(size, stage, rng):
    """[(tokens of a question, of its answer), ...] of one sample, behind (the system message's, 0).

    OURS: drawn to look like LLaVA-Pretrain's captions in stage 1, and in stage 2 like
    LLaVA-Instruct's 58K conversations, 23K descriptions and 77K reasonings. The toy's are its own.
    """
    def near(mean, deviation, least, most):
        return int(np.clip(rng.normal(mean, deviation), least, most))

    if size == "toy":
        if stage == 1 or rng.random() < 0.37:
            return [(20, 0), (9, near(16, 7, 4, 35))]
        return [(20, 0), *((9, near(8, 6, 3, 20)) for _ in range(rng.integers(2, 9)))]
    if stage == 1:
        return [(40, 0), (12, int(np.clip(rng.lognormal(2.5, 0.45), 5, 60)))]
    kind = rng.integers(158)
    if kind < 58:
        return [(40, 0), *((14, near(24, 10, 5, 60)) for _ in range(rng.integers(2, 7)))]
    if kind < 81:
        return [(40, 0), (14, near(125, 30, 50, 250))]
    return [(40, 0), (20, near(145, 40, 60, 300))]


def draw_epoch(size, stage, N, rng, n=20_000):
    """`draw_lengths` of n samples, and the tokens of each with N visual ones, (n,)."""
    drawn = [draw_lengths(size, stage, rng) for _ in range(n)]
    return drawn, np.array([N + sum(map(sum, lengths)) for lengths in drawn])


def random_sample(model, view, lengths, rng, width=None, height=None):
    """A sample of those lengths: random ids behind a random picture, a square if it has no size."""
    width, height = width or view.size, height or view.size
    ids = [model.image_id] * view.tokens(width, height)
    labels = [IGNORE] * len(ids)
    for question, answer in lengths:
        new = rng.integers(4, model.image_id, question + answer).tolist()
        ids += new
        labels += [IGNORE] * question + new[question:]
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    picture = (rng.random(), Image.fromarray(pixels))    # its name is another for each
    return {"where": "", "input_ids": ids, "labels": labels, "pictures": [picture]}


def draw_batches(model, config, in_order):
    """The micro-batches of WARM + --repeats global batches.

    in_order   as training plans them; else the timed samples, which are the same, are shuffled.
    """
    rng = np.random.default_rng(0)
    view = view_from(model.meta, model.g.config)
    drawn, lengths = draw_epoch(config.size, config.stage, view.N, rng)
    plan = plan_epoch(lengths, config.global_batch_size, 0, 0)[:WARM + config.repeats]
    samples = []
    for batch in plan:
        batch = batch[np.argsort(lengths[batch])]
        samples += [random_sample(model, view, drawn[i], rng) for i in batch]
    if not in_order:
        warm = WARM * config.global_batch_size
        timed = warm + rng.permutation(len(samples) - warm)
        samples[warm:] = [samples[i] for i in timed]
    batches = []
    n = config.micro_batch_size
    for start in range(0, len(samples), config.global_batch_size):
        batch = samples[start:start + config.global_batch_size]
        batches.append([collate(batch[i:i + n], view) for i in range(0, len(batch), n)])
    return batches


def draw_prompts(model, config):
    """Questions at once, padded on the left."""
    rng = np.random.default_rng(0)
    view = view_from(model.meta, model.g.config)
    lengths = rng.integers(45, 70, config.micro_batch_size).tolist()
    samples = [random_sample(model, view, [(length, 0)], rng) for length in lengths]
    return collate(samples, view, side="left")


# -----------------------------------------------------------------------------
# Contestants. Each function below prepares one and returns turn(k), which measures and reports.


def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_step(step, batch, device):
    """What a training turn tells: its loss per answer token, its time, and its tokens."""
    began = clock(device)
    loss = step(batch)
    seconds = clock(device) - began
    masks = [micro["attention_mask"] for micro in batch]
    return {"loss": loss, "seconds": seconds, "answers": count_answer_tokens(batch),
            "real": sum(mask.sum().item() for mask in masks),
            "padded": sum(mask.numel() for mask in masks)}


def our_training(config, weights):
    """train.py's own step. Rates are 0, so that all steps are of equal weights."""
    model = LLaVA.from_pretrained(weights)
    model.set_stage(config.stage)
    return our_steps(config, Machine(config.device, config.dtype), model)


def our_steps(config, machine, model, checkpoint_activations="none"):
    """turn(k) of a model whose stage is set."""
    batches = draw_batches(model, config, in_order=True)
    theta = machine.place(model, checkpoint_activations, config.compile)
    optimizer = Optimizer(groups_of(theta, {"W": 0.0, "f_phi": 0.0}), machine)
    optimizer.set_lr(1.0)

    def step(batch):
        return update(model, batch, machine, optimizer, count_answer_tokens(batch))[0]
    return lambda k: time_step(step, batches[k], machine.device)


def their_model(config, weights, machine):
    """transformers' model from our checkpoint, in fp32 what trains, the rest as it computes."""
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
    return set_their_stage(model, config.stage, machine)


def set_their_stage(model, stage, machine):
    """Freeze transformers' model as train.py does, on its device."""
    model.requires_grad_(stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else machine.dtype)
    return model.to(machine.device)


def their_training(config, weights):
    """The loop that a careful user would write, with the right mean over the global batch."""
    machine = Machine(config.device, config.dtype)
    batches = draw_batches(LLaVA.from_pretrained(weights), config, in_order=False)
    return their_steps(machine, their_model(config, weights, machine).train(), batches)


def their_steps(machine, model, batches):
    """turn(k) of transformers' model."""
    trains = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trains, lr=0.0, weight_decay=0.0)

    def step(batch):
        n_answer = count_answer_tokens(batch)
        total = 0.0
        adamw.zero_grad()
        for micro in batch:
            inputs = machine.to_device(micro, ("input_ids", "attention_mask", "labels", "X_v"))
            with machine.forward(model):
                loss = model(pixel_values=inputs.pop("X_v"), **inputs, num_items_in_batch=n_answer,
                             use_cache=False).loss
            loss.backward()
            total += loss.item()
        adamw.step()
        return total
    return lambda k: time_step(step, batches[k], machine.device)


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
    return engine_answers(config, machine, model.to(machine.device).eval())


def engine_answers(config, machine, model, compiled=False):
    """turn(k) of a model that lies on its device."""
    batch = draw_prompts(model, config)
    engine = Engine(model, compiled)

    def answer(n):
        return list(zip(*engine.stream(batch, max_new_tokens=n), strict=True))
    return lambda k: time_answers(answer, config.new_tokens, machine.device)


@torch.no_grad()
def their_answers(config, weights):
    """transformers' generate."""
    machine = Machine(config.device, config.dtype)
    model = LLaVA.from_pretrained(weights)
    theirs = their_model(config, weights, machine).to(machine.dtype).eval()
    return generate_answers(config, machine, theirs, draw_prompts(model, config), model.image_id)


def generate_answers(config, machine, theirs, prompts, image_id):
    """turn(k) of transformers' model that lies on its device."""
    batch = machine.to_device(prompts, ("input_ids", "attention_mask", "X_v"))
    pixels = batch.pop("X_v").to(machine.dtype)

    def answer(n):
        ids = theirs.generate(**batch, pixel_values=pixels, max_new_tokens=n, do_sample=False,
                              suppress_tokens=[image_id])
        return ids[:, batch["input_ids"].shape[1]:].tolist()
    return lambda k: time_answers(answer, config.new_tokens, machine.device)


# -----------------------------------------------------------------------------
# Processes that take turns


@cache
def prepared(contestant, config, weights):
    """turn(k) of a contestant, prepared once in its process."""
    return contestant(config, weights)


def take_turn(contestant, config, weights, k):
    """What a contestant's process does."""
    report = prepared(contestant, config, weights)(k)
    return report | {"peak": peak_memory(choose_device(config.device))}


def race(contestants, config):
    """Let {name: contestant} take turns: {name: {what it reports: of each timed turn}}."""
    check_least(config, global_batch_size=1, micro_batch_size=1, repeats=1, new_tokens=2)
    reports = {name: [] for name in contestants}
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        random_llava(config).save_pretrained(folder)
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
                 for name in contestants}
        for k in range(WARM + config.repeats):
            for name, contestant in contestants.items():
                turn = pools[name].submit(take_turn, contestant, config, folder, k)
                reports[name].append(turn.result())
    return {name: to_arrays(found[WARM:]) for name, found in reports.items()}


def to_arrays(replies):
    return {key: np.array([reply[key] for reply in replies]) for key in replies[0]}


def ratio_of(theirs, ours):
    """The median of the pairs' ratios, and their range."""
    ratio = theirs / ours
    return f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"


def bench_train(config):
    """Seconds and memory of a training step, and how many times as long as ours others take."""
    print(config)
    reports = race({"ours": our_training, "transformers": their_training}, config)
    ours = reports["ours"]
    tolerance = 2e-2 if config.dtype in ("bf16", "fp16") else 1e-4
    print(f"{'':<14}{'s/step':>8}{'tokens/s':>10}{'padding':>9}{'peak GB':>9}   time, ours = 1")
    for name, found in reports.items():
        assert np.isclose(mean_loss(found), mean_loss(ours), tolerance), f"{name}: another loss"
        pace = found["seconds"] / found["real"]
        speed = 1 / pace.mean()
        padding = 1 - found["real"].sum() / found["padded"].sum()
        peak = found["peak"].max() / 1e9
        ratio = ratio_of(pace, ours["seconds"] / ours["real"])
        print(f"{name:<14}{found['seconds'].mean():>8.3g}{speed:>10.0f}{padding:>9.1%}{peak:>9.2f}"
              f"   {ratio}")


def mean_loss(found):
    """The loss per answer token of all timed steps."""
    return float(np.average(found["loss"], weights=found["answers"]))


def bench_generate(config):
    """Greedy answers of --new_tokens tokens: tokens a second behind the first, of equal tokens."""
    print(config)
    for n in sorted({1, config.micro_batch_size}):
        reports = race({"ours": our_answers, "transformers": their_answers},
                       replace(config, micro_batch_size=n))
        ours = reports["ours"]
        print(f"{n} at once: tokens/s   s to the first   time behind it, ours = 1")
        for name, found in reports.items():
            assert np.array_equal(found["ids"], ours["ids"]), f"{name}: other tokens than ours"
            speed = n * (config.new_tokens - 1) / np.median(found["seconds"])
            first = np.median(found["first"])
            ratio = ratio_of(found["seconds"], ours["seconds"])
            print(f"{name:<14}{speed:>8.1f}{first:>17.3g}   {ratio}")


# -----------------------------------------------------------------------------
# Data


def padding_of(lengths, batches):
    """The share of padding in batches of indices."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / padded


def bench_data(config):
    """Padding of an epoch's micro-batches, on 1 and on 8 ranks; pictures a second of one core."""
    for stage, G, budget in ((1, 128, 8192), (2, 32, 8192), (2, 128, 8192)):
        rng = np.random.default_rng(0)
        _, lengths = draw_epoch("135m", stage, 256, rng, n=100_000)
        plan = plan_epoch(lengths, G, 0, 0)
        one = padding_of(lengths, batches_of_ranks(plan, lengths, budget, 1))
        eight = padding_of(lengths, batches_of_ranks(plan, lengths, budget, 8))
        shuffled = padding_of(lengths, rng.permutation(len(lengths)).reshape(-1, 16))
        print(f"stage {stage}, batch {G}, {budget} tokens at once: padding {one:.2%} on 1 rank, "
              f"{eight:.2%} on 8; in random batches of 16 {shuffled:.1%}")
    print(picture_speed(config.repeats))


def batches_of_ranks(plan, lengths, budget, world_size):
    """The samples of every micro-batch of every rank."""
    batches = []
    for batch in plan:
        for rank in range(world_size):
            parts = micro_batches(batch, lengths, 0, budget, world_size, rank)
            batches += [np.array(samples)[:, 0] for samples in parts]
    return batches


def picture_speed(repeats, size=224, n=40):
    """A JPEG of COCO's size, read and preprocessed, beside transformers' processor, in words."""
    square = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    file = io.BytesIO()
    Image.effect_noise((40, 30), 64).resize((640, 480)).convert("RGB").save(file, "JPEG")
    torch.set_num_threads(1)             # as in a DataLoader's worker

    def ours():
        return preprocess(load_image(file), size)

    def theirs():
        return processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values[0]

    assert torch.equal(ours(), theirs()), "other pixels"
    times = [(timeit(ours, number=n), timeit(theirs, number=n)) for _ in range(repeats)]
    our_times, their_times = np.array(times).T
    speed = n / np.median(our_times)
    return (f"JPEG of 640 x 480 to {size} x {size}: ours {speed:.0f} pictures/s a core; "
            f"CLIPImageProcessorPil takes {ratio_of(their_times, our_times)} times as long; "
            "equal pixels")


COMMANDS = {"train": (bench_train, Config), "generate": (bench_generate, Config),
            "data": (bench_data, Config)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
