"""
How fast, and in how much memory: this code beside what one would run otherwise, from the same weights and samples.

    python bench.py train --size 135m --stage 2      seconds a step, each contestant in turn; of equal losses only
    python bench.py memory --size 135m --stage 2     peak memory, each contestant in a process of its own
    python bench.py generate --size 135m             tokens a second of greedy answers; equal tokens are asserted
    python bench.py data                             pictures a second; padding of bucketed, packed and random batches
    python bench.py g --size 135m                    g alone, which `train` is given the features of
    python bench.py scale --size 135m --stage 2      seconds and memory with length, pictures and batch: a plot
    python bench.py index                            REACT's retrieval: recall, seconds and memory of HNSW
    python bench.py recipes                          FLOPs, hours and fitting micro-batches of what is published

The peers (peers.py): transformers' LlavaForConditionalGeneration in the loop that a careful user would write (padded batches in
random order, labels, AdamW), the same in HF Trainer (where `accelerate` is installed), and nanoVLM (--peer, a checkout of it).
Weights and pixels are random, lengths are those of the published data (`turns`). Ratios are medians of pairs, with their range.

    MFU = FLOPs that the model's mathematics asks for / (seconds x the device's peak)

counts real tokens, no padding and no recomputation (cost.py). Figures: bench/README.md.
"""
import dataclasses
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from transformers import (AddedToken, AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel,
                          LlamaConfig, PreTrainedTokenizerFast)

import retrieve
import train as training
from cost import Longest, Setting, estimate, fitting, flops_of
from data import IGNORE, TEMPLATES, Conversations, Steps, collate, micro_batches, plan_epoch
from decode import Fast, Plain
from images import load_image, preprocess, view_of
from model import DTYPES, LLaVA, choose_device, choose_dtype
from peers import Given, careful_loop, count, nanovlm, trainer, transformers_model, wait
from records import IMAGE, Records, typed_flags

#       f_phi: words, D, inner, layers, heads, kv heads, tied;  g: D_v, inner, layers, heads, pixels, patch
VIT_L = (1024, 4096, 24, 16, 224, 14)
SIZES = {
    "toy": ((741, 128, 384, 4, 8, 8, True), (128, 512, 2, 4, 64, 16)),       # toy_parts
    "135m": ((49152, 576, 1536, 30, 9, 3, True), VIT_L),                     # SmolLM2's shape
    "1b": ((32064, 2048, 5632, 22, 32, 4, False), VIT_L),                    # TinyLlama's
    "7b": ((32064, 4096, 11008, 32, 32, 32, False), VIT_L),                  # Vicuna's
}
BATCHES = {"toy": {1: (8, 8), 2: (32, 32)}, "135m": {1: (16, 16), 2: (8, 8)},            # samples a step and at once
           "1b": {1: (32, 16), 2: (16, 4)}, "7b": {1: (32, 16), 2: (16, 4)}}
WARM = 2                                                 # steps before the clock starts: what is compiled is compiled then
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # FLOP/s of dense bf16, as their maker states
RATE = 52                                                # pictures/s of an H100 in stage 1 of 7B at an MFU of 50% (recipes)


@dataclass(frozen=True)
class Config:
    size: str = "135m"                  # toy, 135m, 1b or 7b
    stage: int = 2
    image_size: int = None              # pixels of CLIP: 224, or 336
    features: bool = True               # grid features are given, g is not run (train prints its cost apart); toy: it is run
    global_batch_size: int = None       # samples a step
    micro_batch_size: int = None        # samples at once
    repeats: int = 5                    # timed steps of each contestant, after one to warm up
    levers: bool = False                # also time what each of our ways brings, by leaving it out
    compile: bool = True                # ours runs with train.py --compile
    checkpoint_activations: str = "none"    # as in train.py, for ours; the peers then recompute all layers
    only: str = None                    # one contestant alone
    peer: str = None                    # a checkout of nanoVLM
    new_tokens: int = 64                # of generate
    mfu: float = 0.5                    # that recipes counts hours with
    out: str = "bench"                  # scale's plots
    seed: int = 0
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32 compute


CHOICES = {"size": list(SIZES), "stage": [1, 2], "device": ["auto", "cuda", "mps", "cpu"], "dtype": ["auto", *DTYPES]}


# ---------------------------------------------------------------------------------------------------------------------
# What all contestants get


def build(args, device):
    """A LLaVA of that size with random weights; where features are given, with what is left of g."""
    (V, D, inner, layers, heads, kv, tied), vit = SIZES[args.size]
    torch.manual_seed(args.seed)
    with torch.device(device):
        f_phi = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, tie_word_embeddings=tied, max_position_embeddings=4096, bos_token_id=1, eos_token_id=1,
            pad_token_id=0))
        g = CLIPVisionModel(vision_config(*vit, args.image_size, 2 if args.features else None))
    return LLaVA(g, f_phi, word_tokenizer())


def vision_config(D_v, inner, layers, heads, pixels, patch, other_pixels=None, other_layers=None):
    """A CLIP's configuration from a row of SIZES."""
    return CLIPVisionConfig(hidden_size=D_v, intermediate_size=inner, num_hidden_layers=other_layers or layers,
                            num_attention_heads=heads, image_size=other_pixels or pixels, patch_size=patch)


def word_tokenizer():
    """A tokenizer that knows nothing but `<image>`; ids are drawn, not read."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, IMAGE: 2}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")
    tokenizer.add_tokens([AddedToken(IMAGE, special=True)])
    return tokenizer


def turns(size, stage, rng):
    """[(question's tokens, answer's), ...] of one sample. OURS: drawn to look like LLaVA-Pretrain's captions in stage 1, and in
    stage 2 like LLaVA-Instruct's 58K conversations, 23K descriptions and 77K reasonings; the toy's are its own."""
    near = lambda mean, deviation, least, most: int(np.clip(rng.normal(mean, deviation), least, most))
    if size == "toy":
        if stage == 1 or rng.random() < 0.37:
            return [(9, near(16, 7, 4, 35))]
        return [(9, near(8, 6, 3, 20)) for _ in range(rng.integers(2, 9))]
    if stage == 1:
        return [(12, int(np.clip(rng.lognormal(2.5, 0.45), 5, 60)))]
    kind = rng.integers(158)
    if kind < 58:
        return [(14, near(24, 10, 5, 60)) for _ in range(rng.integers(2, 7))]
    return [(14, near(125, 30, 50, 250))] if kind < 81 else [(20, near(145, 40, 60, 300))]


PROMPT = {"toy": 20, "135m": 40, "1b": 40, "7b": 40}     # tokens of the system message and roles


def draw(args, N, *numbers):
    """For each number so many global batches of those that `plan_epoch` makes of 20,000 samples, evenly spread over short and
    long ones, in random order: [[turns of a sample, ...], ...] of all."""
    rng = np.random.default_rng(args.seed)
    drawn = [turns(args.size, args.stage, rng) for _ in range(20_000)]
    lengths = np.array([N + PROMPT[args.size] + sum(q + a for q, a in sample) for sample in drawn])
    plan = sorted(plan_epoch(lengths, args.global_batch_size, args.seed, 0)[:-1], key=lambda batch: lengths[batch].sum())
    spread = [plan[int((i + 0.5) / n * len(plan))] for n in numbers for i in rng.permutation(n)]
    return [[drawn[i] for i in batch[np.argsort(lengths[batch])]] for batch in spread]


def fill(model, args, turns, rng, pictures=1):
    """A sample of those lengths, of random ids behind pictures, as `collate` takes it. X_v is Z_v where features are given."""
    V, ids = model.f_phi.config.vocab_size, [model.image_id] * model.N * pictures
    labels = [IGNORE] * len(ids)
    for q, a in [(PROMPT[args.size], 0), *turns]:
        new = rng.integers(3, V, q + a).tolist()
        ids, labels = ids + new, labels + [IGNORE] * q + new[q:]
    shape = (model.N, model.g.config.hidden_size) if args.features else (3, model.view.size, model.view.size)
    shape = (pictures, *shape)
    return {"where": "", "input_ids": ids, "labels": labels, "sizes": [(1, 1)] * pictures, "pictures": ["random"] * pictures,
            "X_v": torch.from_numpy(rng.standard_normal(shape, np.float32))}


def batches_of(model, args):
    """[{"bucketed": micro-batches, "random": ...}, ...]: WARM of them to warm up, then --repeats. The samples of the latter are
    the same in both orders: as training plans them, and shuffled."""
    rng, G = np.random.default_rng(args.seed), args.global_batch_size
    planned = [fill(model, args, turns, rng) for batch in draw(args, model.N, WARM, args.repeats) for turns in batch]
    shuffled = [planned[i] for i in (*range(WARM * G), *(WARM * G + rng.permutation(len(planned) - WARM * G)))]
    cut = lambda some: [[collate(some[i:i + args.micro_batch_size]) for i in range(at, at + G, args.micro_batch_size)]
                        for at in range(0, len(some), G)]
    return [{"bucketed": a, "random": b} for a, b in zip(cut(planned), cut(shuffled))]


def flops(model, args, batch):
    """FLOPs of one step on a list of micro-batches, of what is real in them."""
    lengths = [n for b in batch for n in b["attention_mask"].sum(1).tolist()]
    pictures = sum(len(b["pictures"]) for b in batch)
    return flops_of(model, lengths, count(batch)[0], pictures * model.N, 0 if args.features else pictures)


def peak_flops(device, dtype):
    """The device's peak, and where it is from: its maker's figure, or else the best of ten products of 2048 x 2048 matrices."""
    if device.type == "cuda" and dtype != torch.float32:
        if known := [rate for name, rate in PEAK.items() if name in torch.cuda.get_device_name(device)]:
            return known[0], "stated"
    x = torch.randn(2048, 2048, device=device, dtype=dtype)
    return 2 * 2048 ** 3 / min(seconds(lambda: x @ x, device) for _ in range(10)), "measured"


def seconds(function, device):
    began = wait(device)
    function()
    return wait(device) - began


def race(run, repeats, device, warm=0):
    """{name: seconds of each repeat} of functions that take turns, without the first `warm` rounds."""
    rounds = [[seconds(function, device) for function in run.values()] for _ in range(warm + repeats)]
    return dict(zip(run, np.array(rounds[warm:]).T))


def times_as_long(theirs, ours):
    """The median of the pairs' ratios, and their range."""
    ratio = theirs / ours
    return f"{np.median(ratio):.2f} times as long ({ratio.min():.2f} to {ratio.max():.2f})"


# ---------------------------------------------------------------------------------------------------------------------
# Ours, as step(batch) -> loss per answer token, like those of peers.py. Rates are 0: all steps are of equal weights


def ours(model, theta, args, machine, order="bucketed", all_logits=False, compiled=True, other_adamw=False):
    """train.py's own step. The other arguments leave one of its ways out."""
    config = training.Config(stage=args.stage, lr=0.0)
    optimizer = training.adamw(theta, config, machine)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["fused"] ^= other_adamw
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    run = every_logit(model) if all_logits else model

    def step(batch):
        n_answer = count(batch[order])[0]
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            loss, _ = training.backward(run, batch[order], theta, optimizer, scaler, machine, n_answer)
        scaler.step(optimizer)
        scaler.update()
        return loss
    return step


def every_logit(model):
    """Our model, but with the logits of all positions."""
    def forward(input_ids, labels, X_v, **_):
        logits = model.f_phi(inputs_embeds=model.splice(input_ids, X_v), use_cache=False).logits             # (B, T, V)
        targets = labels[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"), None
    return forward


# ---------------------------------------------------------------------------------------------------------------------
# train and memory

PEERS = ("transformers loop", "HF Trainer", "nanoVLM")
LEVERS = {                                               # ours, each with one of its ways left out or changed
    "all logits": {"all_logits": True}, "random batches": {"order": "random"}, "not compiled": {"compiled": False},
    "other AdamW": {"other_adamw": True},
}


def machine_of(args):
    device = choose_device(args.device)
    return training.Machine(0, 1, device, *choose_dtype(args.dtype, device))


def own_model(model, args, machine):
    """Make a model what train.py trains. Returns theta."""
    if args.features:
        model.grid_features = lambda X_v: X_v
    return training.place(model, training.Config(stage=args.stage, compile=args.compile,
                                                 checkpoint_activations=args.checkpoint_activations), machine)


def measure(args):
    """All contestants, one after the other at each step: {name: {seconds, losses, ...}}."""
    machine, wanted = machine_of(args), lambda name: args.only in (None, name)
    model = build(args, machine.device)
    model.set_stage(args.stage)
    batches = batches_of(model, args)
    work = sum(flops(model, args, batch["bucketed"]) for batch in batches[WARM:])
    steps, losses, times = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if any(map(wanted, PEERS)):
            model.save_pretrained(folder)
        if wanted("ours"):
            theta = own_model(model, args, machine)
            steps["ours"] = ours(model, theta, args, machine)
            if args.levers:
                steps |= {f"ours, {name}": ours(model, theta, args, machine, **change) for name, change in LEVERS.items()}
        tower = Given(model.g.config)
        model = None
        theirs = any(map(wanted, PEERS[:2])) and transformers_model(folder, args, machine, tower)
        if wanted("transformers loop"):
            steps["transformers loop"] = careful_loop(theirs, args, machine)
        if wanted("nanoVLM") and args.peer:
            steps["nanoVLM"] = nanovlm(folder, args, machine)

    def turn(k):
        for name, step in steps.items():
            began = wait(machine.device)
            losses.setdefault(name, []).append(step(batches[k]))
            times.setdefault(name, []).append(wait(machine.device) - began)

    if wanted("HF Trainer") and importlib.util.find_spec("accelerate"):
        losses["HF Trainer"], times["HF Trainer"] = trainer(theirs, args, machine, batches, turn)
    else:
        for k in range(len(batches)):
            turn(k)
    results = {}
    for name in times:
        order = "random" if name in (*PEERS, "ours, random batches") else "bucketed"
        answers, real, padded = np.array([count(batch[order]) for batch in batches[WARM:]]).T
        results[name] = {"seconds": times[name][WARM:], "tokens": real.tolist(), "padding": 1 - real.sum() / padded.sum(),
                         "loss": float(np.dot(losses[name][WARM:], answers) / answers.sum()), "flops": work}
    return results, machine


def train(args):
    """Seconds a step, tokens a second, MFU, and how many times as long as ours each takes for the same tokens."""
    results, machine = measure(args)
    first = next(iter(results.values()))
    for name, r in results.items():
        tolerance = 1e-4 if machine.dtype == torch.float32 else 2e-2
        assert abs(r["loss"] / first["loss"] - 1) < tolerance, f"{name}: loss {r['loss']}, ours {first['loss']}"
    rate, source = peak_flops(machine.device, machine.dtype)
    pace = lambda r: np.divide(r["seconds"], r["tokens"])
    print(f"{args.size}, stage {args.stage}, g {'given' if args.features else 'included'}; {machine.device.type}, "
          f"{str(machine.dtype)[6:]}, {torch.get_num_threads()} threads, peak {rate / 1e12:.3g} TFLOP/s ({source})\n"
          f"{args.repeats} x {args.global_batch_size} samples, {args.micro_batch_size} at once; loss {first['loss']:.3f}")
    print(f"{'':<26}{'s/step':>8}{'tokens/s':>10}{'MFU':>7}{'padding':>9}   time, ours = 1 (range)")
    for name, r in results.items():
        ratio, total = pace(r) / pace(first), sum(r["seconds"])
        print(f"{name:<26}{np.mean(r['seconds']):>8.3g}{sum(r['tokens']) / total:>10.0f}{r['flops'] / total / rate:>7.1%}"
              f"{r['padding']:>9.1%}   {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")


def peak_memory(args):
    """Peak memory of each contestant, and its time, each in a process of its own."""
    if args.only:
        results, machine = measure(args)
        results[args.only]["peak"] = training.peak_memory(machine.device)
        return print(json.dumps(results))
    first = None
    for name in ("ours", *(name for name in PEERS if name != "nanoVLM" or args.peer)):
        if name == "HF Trainer" and not importlib.util.find_spec("accelerate"):
            continue
        flags = [f"--{'no-' * (value is False)}{key}" if isinstance(value, bool) else f"--{key}={value}"
                 for key, value in vars(args).items() if value is not None and key != "only"]
        done = subprocess.run([sys.executable, __file__, "memory", *flags, "--only", name], capture_output=True, text=True)
        if done.returncode:
            print(f"{name:<20} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        r = json.loads(done.stdout.splitlines()[-1])[name]
        first = first or r
        print(f"{name:<20}{r['peak'] / 1e9:>8.2f} GB, ours is {first['peak'] / r['peak']:.2f} of it; "
              f"{np.mean(r['seconds']):.3g} s/step")


# ---------------------------------------------------------------------------------------------------------------------
# generate, data


@torch.no_grad()
def generate(args):
    """Greedy answers of --new_tokens tokens, to one question and to --micro_batch_size at once, beside transformers' own."""
    machine = machine_of(args)
    model = build(args, machine.device).to(machine.dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers_model(folder, args, machine, Given(model.g.config)).to(machine.dtype).eval()
    decoders = {"ours": Fast(model.f_phi)}
    if args.levers:
        decoders |= {"layers of transformers": Plain(model.f_phi), "compiled": Fast(model.f_phi, compiled=True)}
    if args.features:
        model.grid_features = lambda X_v: X_v
    rng = np.random.default_rng(args.seed)
    for B in (1, args.micro_batch_size):
        b = collate([fill(model, args, [(int(rng.integers(5, 30)), 0)], rng) for _ in range(B)], side="left")
        X_v = b["X_v"].to(machine.device, machine.dtype)
        inputs = {k: b[k].to(machine.device) for k in ("input_ids", "attention_mask")}
        answers, T = {}, inputs["input_ids"].shape[1]

        def ours(decoder, n):
            model.decoder = decoder
            return list(map(list, zip(*model.stream(**inputs, X_v=X_v, max_new_tokens=n))))

        def transformers(n):
            return theirs.generate(**inputs, pixel_values=X_v, max_new_tokens=n, do_sample=False,
                                   suppress_tokens=[model.image_id])[:, T:].tolist()

        run = {"ours": functools.partial(ours, decoders["ours"]), "transformers": transformers}
        run |= {f"ours, {name}": functools.partial(ours, decoders[name]) for name in decoders if name != "ours"}
        N, rounds = args.new_tokens, {}
        for name, function in run.items():
            for n in (1, N):
                rounds[name, n] = lambda name=name, n=n, function=function: answers.update({(name, n): function(n)})
        times = race(rounds, args.repeats, machine.device, warm=1)
        print(f"{args.size}, {B} at once, {T} + {N} tokens; equal tokens")
        for name in run:
            assert answers[name, N] == answers["ours", N], f"{name}: other tokens"
            alone, whole = times[name, N] - times[name, 1], times[name, N]
            of_ours = times["ours", N] - times["ours", 1], times["ours", N]
            print(f"{name:<28}{B * (N - 1) / np.median(alone):>8.1f} tokens/s behind the first, which takes "
                  f"{np.median(times[name, 1]):.3g} s" + ("" if name == "ours" else f"; {times_as_long(alone, of_ours[0])}, "
                                                          f"with the first {times_as_long(whole, of_ours[1])}"))


def packed(lengths, budget, window):
    """Share of padding of greedy packing: within each window, longest first into the first row with room (first fit)."""
    rows = 0
    for start in range(0, len(lengths), window):
        room = []
        for n in sorted(lengths[start:start + window], reverse=True):
            at = next((i for i, left in enumerate(room) if left >= n), len(room))
            room[at:at + 1] = [(room[at] if at < len(room) else budget) - n]
        rows += len(room)
    return 1 - lengths.sum() / (rows * budget)


def data(args):
    """Padding of an epoch's micro-batches, on 1 and on 8 ranks, and pictures a second of one core."""
    for stage, G, micro in ((1, 128, 16), (2, 32, 4), (2, 128, 16)):
        rng = np.random.default_rng(args.seed)
        lengths = np.array([256 + 40 + sum(q + a for q, a in turns("7b", stage, rng)) for _ in range(100_000)])

        def padding(batches):
            return 1 - sum(lengths[b].sum() for b in batches) / sum(len(b) * lengths[b].max() for b in batches)

        plan, line = plan_epoch(lengths, G, args.seed, 0), []
        for ranks in (1, 8):
            m = min(micro, G // ranks)
            mine = [np.array([i for _, i, scored in keys if scored]) for b in plan for r in range(ranks)
                    for keys in micro_batches(b, lengths, 0, m, ranks, r)]
            line.append(f"{padding([b for b in mine if len(b)]):.2%} on {ranks}")
        order = rng.permutation(len(lengths))
        print(f"stage {stage}, batch {G}, micro-batch {micro}: padding {', '.join(line)} ranks; packed to 2,048 tokens "
              f"{packed(lengths[order[:20_000]], 2048, 50 * G):.2%}; random {padding(order.reshape(-1, micro)):.1%}")
    size = args.image_size or 224
    theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    noise = np.random.default_rng(args.seed).integers(0, 256, (30, 40, 3), np.uint8)
    picture = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)     # of COCO's size
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    run = {"ours": lambda: preprocess(load_image(file), size),
           "theirs": lambda: theirs(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"][0]}
    assert torch.equal(*(function() for function in run.values())), "other pixels"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                             # as in a DataLoader's worker
    forty = {name: lambda function=function: [function() for _ in range(40)] for name, function in run.items()}
    times = race(forty, args.repeats, torch.device("cpu"))
    torch.set_num_threads(threads)
    print(f"JPEG of 640 x 480 to {size} x {size}: ours {40 / np.median(times['ours']):.0f} pictures/s a core; "
          f"CLIPImageProcessorPil takes {times_as_long(times['theirs'], times['ours'])}; equal pixels")
    for workers in (1, 2):
        print(f"{workers} workers: {waiting(file, size, workers):.1%} of a step is waited for data where a GPU takes {RATE} "
              "pictures/s")


def waiting(file, size, workers, micro=16, steps=60):
    """The share of a step that train.py's loader lets wait, of a GPU that is not here: a pause stands for what it computes."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):                              # under names of their own: a batch holds a picture once
            with open(os.path.join(folder, f"{i}.jpg"), "wb") as f:
                f.write(file.getvalue())
        with open(os.path.join(folder, "chat.json"), "w") as f:
            json.dump([{"id": str(i), "image": f"{i % 64}.jpg", "conversations": [
                {"from": "human", "value": IMAGE}, {"from": "gpt", "value": "word " * 15}]} for i in range(steps * micro)], f)
        records = Records([os.path.join(folder, "chat.json")])
        chats = Conversations(records, folder, word_tokenizer(), TEMPLATES["plain"], view_of("crop", size, 14))
        loader = DataLoader(Steps(chats, np.arange(steps * micro), np.ones(steps * micro), micro, micro), batch_size=None,
                            sampler=range(steps), num_workers=workers)
        waited, ended = [], time.perf_counter()
        for _ in loader:
            waited.append(time.perf_counter() - ended)
            time.sleep(micro / RATE)
            ended = time.perf_counter()
    waited = sum(waited[10:])                            # the first are of the workers' start
    return waited / (waited + (steps - 10) * micro / RATE)


@torch.no_grad()
def vision(args):
    """Z_v of --micro_batch_size pictures by g, which stops at the layer that is read, beside transformers' whole tower."""
    machine = machine_of(args)
    model = build(dataclasses.replace(args, features=False), machine.device).to(machine.dtype).eval()
    pixels = torch.randn(args.micro_batch_size, 3, model.view.size, model.view.size, device=machine.device, dtype=machine.dtype)
    run = {"ours": lambda: model.grid_features(pixels),
           "theirs": lambda: model.g(pixels, output_hidden_states=True).hidden_states[model.feature_layer][:, 1:]}
    torch.testing.assert_close(*(function() for function in run.values()), rtol=0, atol=0)
    times = race(run, args.repeats, machine.device)
    print(f"g of {args.size}, {model.view.size} px, {args.micro_batch_size} at once: "
          f"{np.median(times['ours']) / args.micro_batch_size:.3g} s a picture; the whole tower takes "
          f"{times_as_long(times['theirs'], times['ours'])}; equal features")


def clusters(n, queries, D=512, centres=200, seed=0):
    """Unit vectors around centres, and queries nearer to these: (features float16, queries float32)."""
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    middle = unit(rng.standard_normal((centres, D), dtype=np.float32))
    near = lambda n, far: unit(middle[rng.integers(centres, size=n)] + far * rng.standard_normal((n, D), dtype=np.float32))
    parts = [near(min(2 ** 16, n - at), 0.08).astype(np.float16) for at in range(0, n, 2 ** 16)]
    return np.concatenate(parts), near(queries, 0.03)


def recall(index, exact, queries, k=50):
    """Share of the k nearest vectors that an index finds."""
    found, truth = (retrieve.search(i, queries, k)[1] for i in (index, exact))
    return np.mean([len({*a} & {*b}) / k for a, b in zip(found, truth)])


def index(args):
    """REACT's retrieval (Diss. Ch. 2): HNSW beside exact search on 200,000 vectors of 512 dimensions; then a million of them
    indexed from a file, and 10,000 queries for their 50 nearest."""
    cpu, n = torch.device("cpu"), 200_000
    features, queries = clusters(n, 1000)
    exact, hnsw = (retrieve.build(features, np.arange(n), kind) for kind in ("flat", "hnsw"))
    print(f"{n:,} vectors: recall@50 of HNSW {recall(hnsw, exact, queries):.4f}", flush=True)
    del exact, hnsw
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/features.npy", clusters(5 * n, 0)[0])
        features, queries, made = np.load(f"{folder}/features.npy", mmap_mode="r"), clusters(1, 10_000)[1], []
        build = seconds(lambda: made.append(retrieve.build(features, np.arange(5 * n), "hnsw")), cpu)
        search = seconds(lambda: retrieve.search(made[0], queries, 50), cpu)
    print(f"{5 * n:,} vectors: indexed in {build:.0f} s, {len(queries):,} queries in {search:.0f} s, "
          f"{training.peak_memory(cpu) / 1e9:.1f} GB at the peak, {torch.get_num_threads()} threads")


# ---------------------------------------------------------------------------------------------------------------------
# scale


def scale(args):
    """Seconds of our step, and the memory that cost.py counts for it, with the length, the pictures and the batch; a plot."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    machine, rng = machine_of(args), np.random.default_rng(args.seed)
    model = build(args, machine.device)
    model.set_stage(args.stage)
    parts = model.g.config, model.f_phi.config, model.tokenizer, model.view
    step, N = ours(model, own_model(model, args, machine), args, machine), model.N
    grid = {"tokens of one sample with one picture": [(N + n, 1, 1) for n in (64, 192, 448, 960, 1728)],
            "pictures of one sample with 128 more tokens": [(128 + k * N, k, 1) for k in range(5)],
            f"samples of {N + 192} tokens at once": [(N + 192, 1, B) for B in (1, 2, 4, 8)]}
    config = training.Config(stage=args.stage)
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for (name, points), ax in zip(grid.items(), axes):
        xs, times, sums = [], [], []
        for T, pictures, B in points:
            asked = T - pictures * N - PROMPT[args.size]
            samples = [fill(model, args, [(asked // 2, asked - asked // 2)], rng, pictures) for _ in range(B)]
            batch = {"bucketed": [collate(samples)]}
            step(batch)
            times.append(np.median([seconds(lambda: step(batch), machine.device) for _ in range(args.repeats)]))
            need = estimate(Setting(*parts, config, machine.dtype), Longest(T, asked - asked // 2, [(1, 1)] * pictures))
            sums.append(sum(need(B, training.every_of(args.checkpoint_activations)).values()) / 1e9)
            xs.append(T if "tokens of one" in name else pictures if "pictures" in name else B)
            print(f"{T} tokens, {pictures} pictures, {B} at once: {times[-1]:.3g} s, {sums[-1]:.2f} GB", flush=True)
        other = ax.twinx()
        ax.plot(xs, times, "o-", color="tab:blue")
        other.plot(xs, sums, "s--", color="tab:orange")
        ax.set(xlabel=name, ylabel="seconds a step (blue)", ylim=(0, None), xlim=(0, None))
        other.set(ylabel="GB, counted (orange, dashed)", ylim=(0, None))
    fig.suptitle(f"{args.size}, stage {args.stage}, {machine.device.type}, {str(machine.dtype)[6:]}")
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, f"scale_{args.size}_stage_{args.stage}.png")
    fig.savefig(path, dpi=110)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# recipes: memory and hours of what is published, from configurations alone

LLAMA_7B = dict(vocab_size=32064)                        # the rest is LlamaConfig's own
LLAMA_13B = dict(LLAMA_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
MISTRAL_7B = dict(LLAMA_7B, intermediate_size=14336, num_key_value_heads=8)
YI_34B = dict(vocab_size=64064, hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
              num_key_value_heads=8)
# samples of stage 1 and of stage 2, each with the hours that were published for them on 8 A100
PUBLISHED = {
    "llava-7b": (LLAMA_7B, (595_375, 2), (158_000, None)), "llava-13b": (LLAMA_13B, (595_375, 4), (158_000, 10)),
    "llava-1.5-7b": (LLAMA_7B, (558_128, 3.5), (665_298, 10)), "llava-1.5-13b": (LLAMA_13B, (558_128, 5.5), (665_298, 20)),
    "llava-1.5-7b-lora": (LLAMA_7B, (558_128, 3.5), (665_298, None)),
    "llava-1.5-hd-13b": (LLAMA_13B, (558_128, None), (665_298, None)),
    "llava-next-vicuna-7b": (LLAMA_7B, (558_128, None), (760_000, None)),
    "llava-next-vicuna-13b": (LLAMA_13B, (558_128, None), (760_000, None)),
    "llava-next-mistral-7b": (MISTRAL_7B, (558_128, None), (760_000, None)),
    "llava-next-yi-34b": (YI_34B, (558_128, None), (760_000, None)),
}
CARDS = {"24 GB": 24, "40 GB": 40, "80 GB": 80, "H200 141 GB": 141}


def recipes(args):
    """What published recipes ask for: FLOPs, hours on 8 GPUs at --mfu, and the largest micro-batch that fits (cost.py)."""
    print(f"hours on 8 GPUs at an MFU of {args.mfu:.0%}, which is an assumption\n"
          "| recipe | stage | tokens/sample | PFLOP | 8 x A100 | 8 x H100 | published, 8 x A100 | the MFU that this was |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for recipe, (text, *stages) in PUBLISHED.items():
        for stage, (samples, hours) in enumerate(stages, 1):
            config, _ = training.resolve(["--recipe", recipe, "--stage", str(stage)] + ["--init", "none"] * (stage == 2))
            pixels = 336 if config.vision.endswith("336") else 224
            view = view_of(config.aspect, pixels, 14, config.anyres)
            setting = Setting(vision_config(*VIT_L, pixels), LlamaConfig(**text), word_tokenizer(), view, config,
                              torch.bfloat16)
            with FakeTensorMode():
                model = setting.model()
            size = (640, 480)                            # of most COCO pictures
            rng, N = np.random.default_rng(args.seed), view.tokens(*size)
            drawn = [turns("7b", stage, rng) for _ in range(1000)]
            texts = [PROMPT["7b"] + sum(q + a for q, a in one) for one in drawn]
            work = samples * config.epochs / len(drawn) * flops_of(
                model, [N + n for n in texts], sum(a for one in drawn for _, a in one), len(drawn) * N,
                len(drawn) * view.n_squares(*size))
            a100, h100 = (work / (8 * PEAK[card] * args.mfu * 3600) for card in ("A100", "H100"))
            was = f"{a100 * args.mfu / hours:.0%}" if hours else "-"
            print(f"| {recipe} | {stage} | {N + np.mean(texts):.0f} | {work / 1e15:,.0f} | {a100:.1f} | {h100:.1f} | "
                  f"{hours or '-'} | {was} |", flush=True)
            T = config.max_length if stage == 2 else view.N + 200
            most = max(view.tiling.pinpoints, key=lambda canvas: view.tiling.plan(*canvas).tokens) if view.tiling else size
            longest = Longest(T, T - view.tokens(*most) - PROMPT["7b"], [most])
            cells = []
            for ranks in (1, 8):
                there = setting._replace(config=dataclasses.replace(config, shard=ranks > 1), ranks=ranks)
                need = estimate(there, longest)
                for card in CARDS.values():
                    fits = [(way, m) for way, m in fitting(need, config.global_batch_size // ranks, card * 1e9) if m <= 32]
                    cells.append(f"{fits[0][1]} {fits[0][0]}" if fits else "-")
            rows.append(f"| {recipe} | {stage} | {T} | {' | '.join(cells)} |")
    print("\nmicro-batch and --checkpoint_activations that fit, a tenth left free: on one GPU, and on 8 with --shard\n"
          f"| recipe | stage | longest sample | {' | '.join(CARDS)} | {' | '.join(f'8 x {card}' for card in CARDS)} |\n"
          "| --- | --- | --- |" + " --- |" * 8)
    print("\n".join(rows))


COMMANDS = {"train": train, "memory": peak_memory, "generate": generate, "data": data, "g": vision, "scale": scale,
            "index": index, "recipes": recipes}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"python bench.py {' | '.join(COMMANDS)} [--flags]; --help behind a command lists them")
    typed = typed_flags(Config, argv[1:], f"bench.py {argv[0]}", CHOICES)
    args = Config(**typed)
    G, micro = BATCHES[args.size][args.stage]
    G = args.global_batch_size or G
    args = dataclasses.replace(args, features=typed.get("features", args.size != "toy"), global_batch_size=G,
                               micro_batch_size=min(args.micro_batch_size or micro, G))
    if args.peer and not (args.features and os.path.isfile(os.path.join(args.peer, "models", "vision_language_model.py"))):
        raise ValueError(f"--peer {args.peer}: a checkout of nanoVLM is needed, and --features, as its g is no CLIP")
    if G % args.micro_batch_size:
        raise ValueError(f"--micro_batch_size {args.micro_batch_size} does not divide --global_batch_size {G}")
    COMMANDS[argv[0]](args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
