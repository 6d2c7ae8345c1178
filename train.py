"""
How it is trained (Sec. 4.2): one loop for both stages.

    torchrun --nproc_per_node=8 train.py --stage 1                       W alone, on image-caption pairs
    torchrun --nproc_per_node=8 train.py --stage 2 --init out/stage1     W and f_phi, on instructions

The defaults run the paper. A flag given on the command line wins over the recipe, the recipe over the defaults;
the resolved configuration is printed with where each value came from.
"""
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from checkpoint import PROJECTORS, load_settings
from cost import Longest, Setting, estimate, plan
from data import (TEMPLATES, Conversations, Steps, check_template, collate, colored, inspect, report_problems, report_sources,
                  template_for, use_color)
from images import ASPECTS, view_of
from lora import add_adapters, dropout_on, save_adapter
from model import DTYPES, IGNORE, LLaVA, choose_device, choose_dtype
from records import Records, brief_instructions, typed_flags, whole_lines
from sharding import own, read_state, recompute, saved_steps, shard, whole_state, write_state

# ---------------------------------------------------------------------------------------------------------------------
# The recipes: what is published, one row a stage (Sec. 4.2, "Training")

CC3M, COCO = "data/LLaVA-CC3M-Pretrain-595K", "data/LLaVA-Instruct-150K"
CLIP = "openai/clip-vit-large-patch14"                    # 224 px, 256 visual tokens
PAPER = {
    "both": dict(vision=CLIP, template="llava_v0", max_length=2048, image_position="random"),
    1: dict(data=[f"{CC3M}/chat.json"], images=f"{CC3M}/images", epochs=1, lr=2e-3, global_batch_size=128,
            micro_batch_size=16),
    # OFFICIAL: the later "full schedule" script of the project trains stage 2 with batch 128; the paper says 32.
    2: dict(data=[f"{COCO}/llava_instruct_150k.json"], images="data/coco/train2017", epochs=3, lr=2e-5,
            global_batch_size=32, micro_batch_size=4),
}
CLIP_336 = "openai/clip-vit-large-patch14-336"            # 576 visual tokens a square
V1_5 = {                                                  # Diss. Sec. 4.3
    "both": dict(vision=CLIP_336, projector="mlp2x_gelu", template="vicuna_v1", max_length=2048, image_position="first"),
    1: dict(data=["data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"], images="data/LLaVA-Pretrain", epochs=1, lr=1e-3,
            global_batch_size=256, micro_batch_size=32, stage1_question=False),
    2: dict(data=["data/llava_v1_5_mix665k.json"], images="data", epochs=1, lr=2e-5, global_batch_size=128,
            micro_batch_size=16, aspect="pad"),
}
NEXT = {                                                  # Diss. Sec. 4.7; OURS: the mixture of 760K was not released in full
    "both": dict(V1_5["both"], max_length=4096),
    1: V1_5[1],
    2: dict(V1_5[2], data=["data/llava_next.json"], aspect="anyres", lr_g=2e-6),
}
SCIENCEQA = {                                             # Sec. 5.2; what runs/scienceqa.sh writes; stage 1 is the paper's
    "both": dict(PAPER["both"], image_position="first"), 1: PAPER[1],
    2: dict(data=["out/scienceqa/train.json"], images="data/scienceqa/images/train", epochs=12, lr=2e-5, global_batch_size=32,
            micro_batch_size=4),
}
# OURS: the paper in miniature, on two CPU cores (toy.py). The image first: a small model learns one place sooner than two.
TOY = {
    "both": dict(vision="toy_parts/clip", llm="toy_parts/llm", template="llava_v0", max_length=512, image_position="first",
                 images="out/toy/world/images", workers=0, val_samples=64),
    1: dict(data=["out/toy/stage1.json"], epochs=1, lr=1e-2, global_batch_size=8),
    2: dict(data=["out/toy/instruct/instruct.json"], epochs=3, lr=5e-4, global_batch_size=32),
}
TOY_1_5 = {"both": dict(TOY["both"], projector="mlp2x_gelu"), 1: TOY[1], 2: dict(TOY[2], aspect="pad")}


def on(base, llm, **more):
    """A system's recipe on one language model."""
    return {**base, "both": dict(base["both"], llm=llm, **more)}


RECIPES = {
    # OURS: the paper's Vicuna v0 exists only as a delta on LLaMA; v1.3 is the closest that loads by name.
    "llava-7b": on(PAPER, "lmsys/vicuna-7b-v1.3"),
    "llava-13b": on(PAPER, "lmsys/vicuna-13b-v1.3"),
    "scienceqa-7b": on(SCIENCEQA, "lmsys/vicuna-7b-v1.3"),
    "scienceqa-13b": on(SCIENCEQA, "lmsys/vicuna-13b-v1.3"),
    "llava-1.5-7b": on(V1_5, "lmsys/vicuna-7b-v1.5"),
    "llava-1.5-13b": on(V1_5, "lmsys/vicuna-13b-v1.5"),
    "llava-1.5-7b-lora": {**on(V1_5, "lmsys/vicuna-7b-v1.5"), 2: dict(V1_5[2], lr=2e-4, lr_W=2e-5, lora_rank=128)},
    "llava-1.5-13b-lora": {**on(V1_5, "lmsys/vicuna-13b-v1.5"), 2: dict(V1_5[2], lr=2e-4, lr_W=2e-5, lora_rank=128)},
    # OURS: neither its code nor its weights were released; stage 1 is 1.5's at 224 pixels.
    "llava-1.5-hd-13b": {**on(V1_5, "lmsys/vicuna-13b-v1.5", vision=CLIP), 2: dict(V1_5[2], aspect="hd", max_length=4096)},
    "llava-next-vicuna-7b": on(NEXT, "lmsys/vicuna-7b-v1.5"),
    "llava-next-vicuna-13b": on(NEXT, "lmsys/vicuna-13b-v1.5"),
    "llava-next-mistral-7b": on(NEXT, "mistralai/Mistral-7B-Instruct-v0.2", template="mistral_instruct"),
    "llava-next-yi-34b": on(NEXT, "NousResearch/Nous-Hermes-2-Yi-34B", template="chatml_direct"),
    "toy": TOY,
    "toy-1.5": TOY_1_5,
    "toy-hd": {**TOY_1_5, 2: dict(TOY[2], aspect="hd")},
    "toy-next": {**TOY_1_5, 2: dict(TOY[2], aspect="anyres", lr_g=5e-5)},
}


@dataclass(frozen=True)
class Config:
    recipe: str = "llava-7b"            # a row of RECIPES
    stage: int = 1                      # 1: theta = {W}; 2: theta = {W, phi}  (Sec. 4.2)
    data: list[str] = ()                # LLaVA-format JSON files; FILE=0.5 is that share of it, FILE=20000 so many samples
    fraction: float = 1.0               # COURSE: Diss. Sec. 4.5, the share of every file that is trained on
    images: str = None                  # the folder that image names are relative to
    vision: str = None                  # g: hub id or folder of a CLIP
    llm: str = None                     # f_phi: hub id or folder of a language model
    init: str = None                    # checkpoint to start from; stage 2 needs one, or "none" (COURSE: Table 8, no stage 1)
    out: str = None                     # output folder; out/stage1 or out/stage2
    resume: bool = False                # go on where a run with the same flags was stopped
    template: str = "auto"              # auto: the checkpoint's, or chosen from the language model's config
    feature_layer: int = -2             # COURSE: Table 8, -2 "before the last layer" against -1
    projector: str = "linear"           # W: linear, or mlp2x_gelu (Diss. Sec. 4.3)
    aspect: str = "crop"                # how a picture is looked at: crop, pad, anyres, hd (images.py)
    anyres: str = "original"            # or hf: as transformers tiles where it differs (tiles.py)
    global_picture: bool = True         # COURSE: --no-global_picture, tiles alone (Diss. Sec. 4.3, the ablation of HD)
    image_position: str = "random"      # Eq. (2); the released code has "first"
    stage1_question: bool = True        # Sec. 4.2; --no-stage1_question is the released code: image, caption, newline
    max_length: int = 2048              # tokens, images included; longer samples lose whole trailing turns
    skip_bad: bool = False              # leave bad samples out and count them, rather than stop
    epochs: int = 1
    max_steps: int = None               # stop earlier; the schedule ends there too
    lr: float = 2e-3                    # peak, of AdamW without weight decay (betas 0.9, 0.999)
    lr_W: float = None                  # W's own peak
    lr_g: float = None                  # stage 2: the vision tower trains, too, at this rate (Diss. Sec. 4.7)
    lora_rank: int = 0                  # stage 2: low-rank adapters train instead of f_phi's weights (lora.py)
    lora_alpha: float = 256             # their scale is alpha / rank
    lora_dropout: float = 0.05          # its masks depend on seed, step, rank and micro-batch
    warmup_ratio: float = 0.03          # linear, then cosine to 0
    global_batch_size: int = 128        # samples per step over all ranks: the promise
    micro_batch_size: int = None        # samples per forward and rank; what is left becomes accumulation
    seed: int = 42
    val_samples: int = 0                # held out of the data for a validation loss; the paper trains on all
    eval_every: int = 200               # steps
    save_every: int = 500               # steps
    workers: int = 4                    # processes that decode pictures, per rank
    keep: int = 1                       # states to go on from that are kept in out/train_state
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32 compute; what trains is kept in fp32
    shard: bool = False                 # weights, gradients and moments over all ranks (sharding.py)
    offload: bool = False               # with --shard: they lie in the CPU's memory, where AdamW runs
    checkpoint_activations: str = "none"    # or all, every_2, every_3, ...: of the decoder layers; less memory, more time
    compile: bool = False               # decoder layers by torch.compile, whose dropout masks are others
    dry_run: bool = False               # one step on the longest samples, nothing written: what it needs, and what would fit
    memory: float = None                # GB a device that --dry_run plans for; else what the device has


CHOICES = {"recipe": list(RECIPES), "stage": [1, 2], "template": ["auto", *TEMPLATES],
           "projector": list(PROJECTORS), "aspect": list(ASPECTS), "anyres": ["original", "hf"],
           "image_position": ["random", "first", "as_written"], "device": ["auto", "cuda", "mps", "cpu"],
           "dtype": ["auto", *DTYPES]}


def resolve(argv):
    """Command line to (Config, {field: where its value came from}). Typed wins over recipe, recipe over default."""
    typed = typed_flags(Config, argv, "Train LLaVA.", CHOICES)
    stage = typed.get("stage", Config.stage)
    recipe = RECIPES[typed.get("recipe", Config.recipe)]
    recipe = {**recipe["both"], **recipe[stage]}
    init = typed.get("init", "none") != "none"
    if "llm" in typed or init:
        recipe["template"] = "auto"      # the recipe's template belongs to the recipe's language model
    if init:
        del recipe["vision"]
        recipe.pop("llm", None)
    if typed.get("lora_rank"):
        recipe.pop("lr_g", None)         # adapters instead
    recipe["out"] = f"out/stage{stage}"
    config = Config(**{**recipe, **typed})
    origin = {f.name: "command line" if f.name in typed else "recipe" if f.name in recipe else "default"
              for f in dataclasses.fields(Config)}
    if stage == 2 and config.init is None:
        raise ValueError("stage 2 starts from stage 1: --init out/stage1, or --init none for a new W (Table 8)")
    for flags, useless, why in ((("lr_g", "lora_rank"), stage == 1, "in stage 1"),
                                (("stage1_question",), stage == 2, "in stage 2"),
                                (("memory",), not config.dry_run, "without --dry_run"),
                                (("lora_alpha", "lora_dropout"), not config.lora_rank, "without --lora_rank"),
                                (("vision", "llm"), init, "with --init, which brings its own")):
        for flag in flags:
            if useless and flag in typed:
                raise ValueError(f"--{flag} does nothing {why}")
    return config, origin


def brought(config, origin):
    """The same with what a model from stage 2 (--init) brings along: a recipe's ways of looking are for one that is new, or
    fresh from stage 1. Typed flags win here, too."""
    if config.init in (None, "none"):
        return config, origin
    theirs, meta, view, projector = load_settings(config.init)
    if meta.get("stage") == 1:
        return config, origin
    own = {"feature_layer": theirs.vision_feature_layer, "projector": projector}
    if origin["aspect"] != "command line" or config.aspect == view.aspect:   # another aspect: none of the old one's details
        own |= view.flags
    own = {flag: value for flag, value in own.items() if origin[flag] != "command line"}
    return dataclasses.replace(config, **own), origin | dict.fromkeys(own, "checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@dataclass
class Machine:
    """This process's place: its rank, its device, and the number format it computes in."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    reason: str                          # why this dtype

    def sum(self, *values):
        """Numbers added up over all ranks (float64)."""
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if self.device.type == "mps" else self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def restarts():
    """How often `torchrun --max-restarts` has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def start(config):
    """Join the other processes of `torchrun`, if any, and choose device and dtype."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if (world_size > 1 or config.shard) and not dist.is_initialized():
        store = dist.HashStore()
        if world_size > 1:               # a restart by torchrun finds the old store, with the addresses of ranks that are gone
            store = dist.PrefixStore(f"restart_{restarts()}", next(rendezvous("env://"))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2),
                                store=store, rank=rank, world_size=world_size)
    machine = Machine(rank, world_size, device, *choose_dtype(config.dtype, device))
    if config.shard and (device.type == "mps" or machine.dtype == torch.float16):
        raise ValueError(f"--shard goes with cuda or cpu and bf16 or fp32, not with {device.type} and {str(machine.dtype)[6:]}")
    if config.offload and (device.type != "cuda" or not config.shard):
        raise ValueError("--offload keeps a GPU's shards in the CPU's memory: it needs cuda and --shard")
    return machine


def accumulation(config, world_size):
    """(micro-batch, accumulation steps) whose product with the ranks is the global batch; ValueError if none is."""
    G = config.global_batch_size
    if G % world_size:
        raise ValueError(f"global_batch_size {G} over {world_size} ranks: take a multiple of {world_size}, "
                         f"e.g. {G // world_size * world_size or world_size} or {(G // world_size + 1) * world_size}")
    share = G // world_size
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        fit = [d for d in range(1, share + 1) if share % d == 0]
        raise ValueError(f"global_batch_size {G} = {world_size} ranks x {share} samples, which micro_batch_size {micro} "
                         f"does not divide; --micro_batch_size {' | '.join(map(str, fit))} would")
    return micro, share // micro


# ---------------------------------------------------------------------------------------------------------------------
# Model and data


def every_of(checkpoint_activations):
    """--checkpoint_activations as a number: 0 for none, 1 for all, 2 for every_2."""
    if not (found := re.fullmatch(r"none|all|every_([1-9]\d*)", checkpoint_activations)):
        raise ValueError(f"--checkpoint_activations {checkpoint_activations!r}: none, all, every_2, every_3, ...")
    return int(found[1] or checkpoint_activations == "all")


def compiled_in_training(forward):
    """A layer's forward, compiled where gradients are wanted: generation, with its cache, would be compiled again and again."""
    compiled = torch.compile(forward, dynamic=True)
    return lambda *args, **more: (compiled if torch.is_grad_enabled() else forward)(*args, **more)


def compile_layers(model, machine):
    """torch.compile of the decoder layers, one by one, for lengths of any kind; all share what is compiled for the first. Where
    there is no compiler, a line says so, and the model runs as it is."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=machine.device))
    except Exception as error:                            # many kinds: no C++ compiler, no Triton, a system unknown to it
        if machine.rank == 0:
            print(f"--compile is not possible here, going on without: {str(error).splitlines()[0][:200]}")
        return
    torch._functorch.config.activation_memory_budget = 0.95  # what is quick to compute is not kept for the backward pass
    for layer in model.f_phi.base_model.layers:
        layer.forward = compiled_in_training(layer.forward)


def build_model(config, machine):
    """The model of a configuration, placed, with what trains of it, and its template."""
    torch.manual_seed(config.seed)                        # W's initial values
    dtype = torch.float32 if config.stage == 2 and not config.lora_rank else machine.dtype
    if config.init in (None, "none"):
        model = LLaVA.from_parts(config.vision, config.llm, config.feature_layer, dtype, config.projector)
    else:
        model = LLaVA.from_pretrained(config.init, dtype)
        for flag in ("feature_layer", "projector"):
            if (found := getattr(model, flag)) != (wanted := getattr(config, flag)):
                raise ValueError(f"--init {config.init} has {flag} {found}, not {wanted}; take --{flag} {found}")
    old, view = model.view, {flag: getattr(config, flag) for flag in model.view.flags}
    if view != old.flags:                                 # else a checkpoint keeps its own canvases
        if view["aspect"] == old.aspect and old != view_of(size=old.size, patch=old.patch, **old.flags):
            raise ValueError(f"--init {config.init} has canvases of its own, {list(old.tiling.pinpoints)}, for {old.flags}; "
                             "leave --anyres and --no-global_picture out")
        model.look(view_of(size=old.size, patch=old.patch, **view))
    model.set_stage(config.stage, train_g=config.lr_g is not None)
    if config.lora_rank:
        if config.init == "none":
            raise ValueError("--lora_rank is for a checkpoint that the adapter belongs to: --init out/stage1")
        tiled = bool(old.tiling) and model.meta.get("stage") != 1            # with row ends that were trained, and stay
        if config.lr_g is not None or bool(model.view.tiling) != tiled:
            raise ValueError("--lora_rank keeps W and adapters alone: --lr_g does not go with it, and an aspect in tiles does "
                             "on a checkpoint whose stage 2 was in tiles, and only there")
        if model.newline is not None:
            model.newline.requires_grad_(False)
        add_adapters(model.f_phi, config.lora_rank, config.lora_alpha, config.lora_dropout)
    theta = place(model, config, machine)
    if config.template != "auto":
        chat = TEMPLATES[config.template]
    elif "chat" in model.meta:                            # what stage 1 was meant to go on with
        chat = TEMPLATES[model.meta["chat"]]
    else:
        chat = template_for(model.f_phi.config, model.tokenizer)
    template = TEMPLATES["plain"] if config.stage == 1 and not config.stage1_question else chat
    check_template(template, model.tokenizer)
    model.tokenizer.chat_template = template.jinja()
    model.meta |= {"template": template.name, "chat": chat.name, "stage": config.stage, "recipe": config.recipe,
                   "init": config.init, "data": list(config.data), "fraction": config.fraction,
                   "seed": config.seed}
    return model, theta, template


def place(model, config, machine):
    """A model whose stage is set, on its device: what trains in fp32, what is frozen in the compute dtype; compiled,
    recomputed, sharded as the flags say. Returns theta, as {name: parameter}."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else machine.dtype)
    model.eval()                                          # CLIP and LLaMA-like models have no dropout to switch on
    if config.compile:
        compile_layers(model, machine)
    if every := every_of(config.checkpoint_activations):
        recompute(model, every)
    if config.shard:
        shard(model, machine.device, machine.dtype, config.offload)
    else:
        model.to(machine.device)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adamw(theta, config, machine):
    """AdamW without weight decay, a group for each part of the model with its own peak rate."""
    groups = {"g": [], "W": [], "f_phi": [], "newline": []}
    for name, p in theta.items():
        groups[name.split(".")[0]].append(p)
    peaks = {"g": config.lr_g, "W": config.lr if config.lr_W is None else config.lr_W, "f_phi": config.lr, "newline": config.lr}
    optimizer = torch.optim.AdamW([{"params": some, "peak": peaks[name]} for name, some in groups.items() if some],
                                  weight_decay=0.0, fused=machine.device.type == "cuda")     # a CPU would gain 1% of a step
    for p in theta.values():                             # AdamW's own start, now: a disk or GPU too small for it shows here
        optimizer.state[p] = {"step": torch.tensor(0.0, device=p.device if machine.device.type == "cuda" else "cpu"),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def build_data(config, machine, model, template):
    """The checked data set: (Conversations, lengths, indices to train on, indices held out, lines for the banner).

    Raises ValueError with file, index and id of what is wrong, before step 0. Rank 0 checks; the others wait.
    """
    questions = brief_instructions() if config.stage == 1 and config.stage1_question else None
    records = Records(config.data, config.fraction, config.seed)
    data = Conversations(records, config.images, model.tokenizer, template, model.view, config.max_length,
                         config.image_position, questions, config.seed)
    found = [inspect(data, config.workers)] if machine.rank == 0 else [None]
    if machine.world_size > 1:
        dist.broadcast_object_list(found)
    problems, table = found[0]
    sources = [line for line, _ in report_sources(data, problems, table)]
    if problems and not config.skip_bad:
        raise ValueError("\n".join([f"{len(problems)} of {len(data)} samples are bad (--skip_bad leaves them out):", *sources,
                                    report_problems(problems, records)]))
    good = np.array([i for i in range(len(data)) if i not in problems], int)
    held_out = np.random.default_rng(config.seed).permutation(good)[:config.val_samples]
    train_on = good[~np.isin(records.texts[good], records.texts[held_out])]      # nor another copy of what is held out
    if not len(train_on):
        raise ValueError(f"{len(good)} good samples, of which --val_samples {config.val_samples} would be held out; lower it")
    tokens, scored, images, turns, dropped = table[good, :5].T
    lines = [f"data: {len(data)} samples, {len(problems)} bad and left out, {config.val_samples} held out",
             *(f"      {line}" for line in sources),
             f"      {images.sum()} images; {tokens.sum()} tokens ({model.view.said}), {scored.sum()} scored; "
             f"{(dropped > 0).sum()} samples lose {dropped.sum() // 2} trailing answers at {config.max_length}",
             f"labels: {len(good)} samples, {(scored == 0).sum()} without scored tokens"]
    limit = model.f_phi.config.max_position_embeddings
    if tokens.max() > limit:
        raise ValueError(f"{records.where(good[tokens.argmax()])}: {tokens.max()} tokens, but the language model's context is "
                         f"{limit}; --max_length {limit} leaves trailing turns out")
    lines += [f"      left out: {line}" for line in report_problems(problems, records, 5).splitlines()]
    return data, table[:, 0], train_on, held_out, lines


def theta_table(model, theta):
    """What is frozen, what trains, and how many parameters each has."""
    lines = [f"theta (stage {model.meta['stage']})      parameters   trains   dtype"]
    for part in ("g", "W", "f_phi", "newline"):
        parameters = {name: p for name, p in model.named_parameters() if name.split(".")[0] == part}
        if not parameters:               # only tiles have a newline
            continue
        n, kind = sum(p.numel() for p in parameters.values()), next(iter(parameters.values())).dtype
        trains = sum(p.numel() for name, p in parameters.items() if name in theta)
        said = "frozen" if not trains else "yes" if trains == n else f"{trains:,} of them"
        lines.append(f"  {part:<12}{n:>18,}   {said:<7}  {str(kind)[6:]}")
    if k := getattr(model.g.config, "gated_layers", 0):
        lines.append(f"  g has {k} gated layers (gated.py): only minLLaVA can run what is saved, not transformers or vLLM")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Saving and resuming. A state is train_state/step_N: theta, AdamW's moments, and the step. Everything random (the order
# of the data, the image's place, W's start) is a function of seed, epoch and index, so the step number is the position.

NOT_COMPARED = {"out", "resume", "save_every", "eval_every", "workers", "device", "micro_batch_size", "keep", "shard",
                "offload", "checkpoint_activations", "dry_run", "memory"}


def save_state(folder, step, config, theta, optimizer, scaler, checksum):
    """Write a state, on all ranks at once; the `--keep` newest stay."""
    facts = {"config": dataclasses.asdict(config), "scaler": scaler.state_dict(), "data": checksum}
    write_state(folder, step, facts, theta, optimizer, config.keep)


def load_state(folder, config, theta, optimizer, scaler, checksum):
    """Restore the newest state in place and return its step; 0 if there is none yet."""
    if not (steps := saved_steps(folder)):
        return 0
    path = os.path.join(folder, steps[-1])
    with open(os.path.join(path, "state.json")) as f:
        state = json.load(f)
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if differ := [f"--{k} {now[k]} (was {v})" for k, v in state["config"].items() if k not in NOT_COMPARED and now[k] != v]:
        raise ValueError(f"--resume: {path} was written by a run with other flags: {', '.join(differ)}")
    if state["data"] != checksum:
        raise ValueError(f"--resume: the data are not those that {path} was written with")
    read_state(path, theta, optimizer)
    scaler.load_state_dict(state["scaler"])
    return state["step"]


def save(config, machine, model, folder):
    """The checkpoint; with adapters, also these alone, for PEFT, beside the merged weights. Gathered on all ranks, written by
    rank 0, whose memory then holds all weights as they train (7B in fp32: 27 GB)."""
    state = whole_state(model)
    if machine.rank == 0:
        model.save_pretrained(folder, machine.dtype, state)
        if config.lora_rank:
            save_adapter(model, os.path.join(folder, "adapter"), config.init, state)


def rehearse_saving(config, machine, model, theta, optimizer, scaler, checksum):
    """Save and load everything once before step 0: a full disk or an unwritable model is better met now."""
    folder = os.path.join(config.out, "rehearsal")
    save(config, machine, model, folder)
    if machine.rank == 0:
        LLaVA.from_pretrained(folder, machine.dtype)
    save_state(os.path.join(folder, "train_state"), 0, config, theta, optimizer, scaler, checksum)
    if machine.rank == 0:
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Guards


def fingerprints(model):
    """{name: two sums over the parameter's bits}: equal before and after a step for what is bit-identical.

    The second sum is of squares: in a sum, as many moves of +lr as of -lr would cancel.
    """
    bits = {2: torch.int16, 4: torch.int32}
    views = {name: own(p.detach()).view(bits[p.element_size()]) for name, p in model.named_parameters()}
    return {name: (b.sum(dtype=torch.int64).item(), (b % 32749).square().sum(dtype=torch.int64).item())
            for name, b in views.items()}


def check_first_step(before, model, theta, lr=math.inf):
    """After the first step of size `lr`, what is frozen is bit-identical, and what got a gradient has moved if fp32 can
    tell: half a unit in the last place of 1.8 is more than the paper's first step."""
    after = fingerprints(model)
    thawed = [n for n in before if n not in theta and after[n] != before[n]]
    stuck = [n for n, p in theta.items() if after[n] == before[n] and p.grad is not None
             and (own(p.grad).abs() > 1e-6)[own(p).abs() < lr / torch.finfo(p.dtype).eps].any()]
    unused = [n for n, p in theta.items() if p.grad is None]
    assert not thawed, f"frozen parameters changed in the first step: {thawed[:5]}"
    assert not stuck, f"trained parameters with a gradient did not move in the first step: {stuck[:5]}"
    assert not unused, f"parameters of theta without a gradient: {unused[:5]}"


def stop_on(condition, machine, step, what, micro, data):
    """On every rank at once: if the condition holds, stop and name the step's samples (those of every rank)."""
    if not condition:
        return
    ids = [name for batch in micro for name in batch["ids"]]
    if machine.world_size > 1:
        everyone = [None] * machine.world_size
        dist.all_gather_object(everyone, ids)
        ids = sum(everyone, [])
    sample = colored(micro[0]["input_ids"][0].tolist(), micro[0]["labels"][0].tolist(), data.tokenizer, False)
    raise ValueError(f"step {step}: {what}; template {data.template.name}; samples {ids[:16]}"
                     f"{' ...' if len(ids) > 16 else ''}; the first is rendered «scored»: {sample}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def lr_at(step, total, config, peak=None):
    """Linear warm-up over the first 3%, then cosine to 0 (step counts from 0).

    OFFICIAL: warm-up there starts at 0, so that the first step changes nothing; here it starts one notch up.
    """
    warmup, peak = math.ceil(config.warmup_ratio * total), config.lr if peak is None else peak
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def to_device(batch, device):
    tensors = {k: batch[k].to(device, non_blocking=True) for k in ("input_ids", "labels", "X_v")}
    return tensors | {"ids": batch["ids"], "sizes": batch["sizes"], "shown": batch.get("shown")}


def backward(model, micro, theta, optimizer, scaler, machine, n_answer):
    """The gradients of one step from this rank's micro-batches. Returns (loss over all ranks, gradient norm).

    Each loss is divided by the answer tokens of the whole global batch (Eq. (3)); times the ranks, because
    DistributedDataParallel averages the ranks' gradients.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for i, batch in enumerate(micro):
        last = i == len(micro) - 1
        waits = hasattr(model, "no_sync") and not last   # DistributedDataParallel; shards are summed at once, for their memory
        with model.no_sync() if waits else contextlib.nullcontext(), machine.autocast():
            loss, _ = model(**to_device(batch, machine.device))
            scaler.scale(loss * (machine.world_size / n_answer)).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    # OFFICIAL: no clipping (DeepSpeed's default in the released runs); the norm is only watched.
    norm = torch.nn.utils.get_total_norm([p.grad for p in theta.values() if p.grad is not None])
    return machine.sum(total)[0] / n_answer, (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@torch.no_grad()
def evaluate(model, data, held_out, micro, machine, step):
    """Validation loss over the held-out samples, and answers to the questions of three of them, as a log record."""
    total = n = 0
    keys = [(0, int(i), True) for i in held_out]
    keys += [(0, keys[0][1], False)] * (-len(keys) % machine.world_size)     # as many on every rank: none waits for another
    mine = keys[machine.rank::machine.world_size]
    for at in range(0, len(mine), micro):
        batch = collate([data[key] for key in mine[at:at + micro]])
        with machine.autocast():
            loss, count = model(**to_device(batch, machine.device))
        total, n = total + loss.item(), n + count
    total, n = machine.sum(total, n)
    record = {"step": step, "val_loss": total / n, "answers": []}
    if machine.rank == 0 or isinstance(model, FSDPModule):                   # shards: every rank has a part in it
        prompts, truths = zip(*(data.question(int(i)) for i in held_out[:3]))
        batch = collate(prompts, side="left")
        with machine.autocast():
            answers = model.generate(*(batch[k].to(machine.device) for k in ("input_ids", "attention_mask", "X_v")),
                                     batch["sizes"], stop=[data.template.STOP], max_new_tokens=64)
        record["answers"] = [{"id": i, "truth": t, "answer": a} for i, t, a in zip(batch["ids"], truths, answers)]
    return record


def dry_run(config, machine, model, theta, data, order):
    """One step on the longest samples (the first in `order`): what each part of it takes, and what would fit, as lines."""
    micro, accumulated = accumulation(config, machine.world_size)
    samples = [data[0, int(i), True] for i in order[:micro]]
    first, batch = samples[0], collate(samples)
    answers = (batch["labels"] != IGNORE).sum(1).tolist()                    # of each
    need = estimate(Setting(model.g.config, model.f_phi.config, model.tokenizer, model.view, config, machine.dtype,
                            machine.world_size), Longest(len(first["input_ids"]), max(answers), first["sizes"]))
    optimizer, scaler = adamw(theta, config, machine), torch.amp.GradScaler(machine.device.type, enabled=False)
    backward(model, [batch], theta, optimizer, scaler, machine, sum(answers))
    optimizer.step()
    parts, gpu = need(len(samples), every_of(config.checkpoint_activations)), machine.device.type == "cuda"
    total = (torch.cuda.get_device_properties(machine.device).total_memory if gpu else
             os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / machine.world_size)
    return [f"one step on {len(samples)} samples at once, the longest {first['where']}: "
            f"{len(first['input_ids'])} tokens, {answers[0]} of them scored",
            *(f"  {part:<20}{n / 1e9:>8.2f} GB" for part, n in {**parts, "together": sum(parts.values())}.items()),
            f"  {'measured':<20}{peak_memory(machine.device) / 1e9:>8.2f} GB at the peak, "
            + ("allocated on the GPU" if gpu else "of this process, with Python and all that it has loaded"),
            *["  activations are counted as they are without --compile, which keeps fewer"] * config.compile,
            *plan(need, micro * accumulated, total if config.memory is None else config.memory * 1e9)]


def peak_memory(device):
    """Bytes at the peak so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plot_losses(folder, ylabel="loss per answer token"):
    """loss.png from log.jsonl; where a resumed run did a step twice, the later one counts."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = whole_lines(os.path.join(folder, "log.jsonl"))
    loss = {r["step"]: r["loss"] for r in log if "loss" in r}
    val = {r["step"]: r["val_loss"] for r in log if "val_loss" in r}
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.plot(list(loss), list(loss.values()), lw=0.8, label="training")
    ax.plot(list(val), list(val.values()), "o-", ms=3, label="held out")
    ax.set(xlabel="step", ylabel=ylabel, title=folder)
    ax.legend()
    fig.savefig(os.path.join(folder, "loss.png"), dpi=120)
    plt.close(fig)


def asked_to_stop():
    """A list that gets the number of each signal from now on by which Ctrl-C or a scheduler asks to stop."""
    stopping = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopping.append(number))
    return stopping


def finish():
    """End with all ranks; from here on a signal means what it meant before `asked_to_stop`."""
    signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def open_log(path):
    """log.jsonl, to append to; a kill may have torn its last line."""
    whole_lines(path, repair=True)
    return open(path, "a")


def ignore_sigterm(worker):
    """A scheduler's SIGTERM reaches all processes; those that load data go on, for the step that is finished and saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def only_run_in(folder):
    """A lock on an output folder, for as long as what is returned is open; ValueError while another run has it."""
    lock = open(os.path.join(folder, "lock"), "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                     # of this process; its data workers do not have it
    except OSError as error:
        raise ValueError(f"{folder}: another run writes there; wait for its end, or take another --out") from error
    return lock


def main(argv=None):
    config, origin = brought(*resolve(argv))
    machine = start(config)
    say = print if machine.rank == 0 else lambda *_, **__: None
    micro_batch_size, steps_accumulated = accumulation(config, machine.world_size)
    log_path, state_folder = os.path.join(config.out, "log.jsonl"), os.path.join(config.out, "train_state")
    if restarts():                                       # it is this run
        config, origin = dataclasses.replace(config, resume=True), origin | {"resume": "torchrun"}
    if os.path.exists(log_path) and not (config.resume or config.dry_run):
        raise ValueError(f"{config.out} holds a run already: --resume to go on with it, or another --out")
    if not config.dry_run:
        os.makedirs(config.out, exist_ok=True)
    alone = only_run_in(config.out) if machine.rank == 0 and not config.dry_run else None    # as long as it is open

    # ---- the banner: what a reader should see before step 0
    say("\n".join(f"{name:<18} {value!s:<50} {origin[name]}" for name, value in vars(config).items()))
    say(f"\n{machine.world_size} x {machine.device.type}, computing in {str(machine.dtype)[6:]} ({machine.reason})")
    model, theta, template = build_model(config, machine)
    say("\n" + "\n".join(theta_table(model, theta)))
    data, lengths, train_on, held_out, lines = build_data(config, machine, model, template)
    steps = Steps(data, train_on, lengths, config.global_batch_size, micro_batch_size, machine.world_size, machine.rank)
    total = min(steps.per_epoch * config.epochs, sys.maxsize if config.max_steps is None else config.max_steps)
    say(f"\nbatch: {config.global_batch_size} = {machine.world_size} ranks x {micro_batch_size} samples x "
        f"{steps_accumulated} accumulated; {steps.per_epoch} steps an epoch, {total} in all")
    say("\n".join(lines))
    example = data[0, int(train_on[0]), True]
    say(f"\none sample, template {template.name}, scored in {'green' if use_color() else '«»'}:\n"
        + colored(example["input_ids"], example["labels"], data.tokenizer, use_color()) + "\n")

    if config.dry_run:
        say("\n".join(dry_run(config, machine, model, theta, data, train_on[np.argsort(-lengths[train_on])])))
        finish()
        return 0
    optimizer = adamw(theta, config, machine)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    checksum = zlib.crc32(data.records.blob, zlib.crc32(lengths.tobytes()))
    rehearse_saving(config, machine, model, theta, optimizer, scaler, checksum)
    first = load_state(state_folder, config, theta, optimizer, scaler, checksum) if config.resume else 0
    wrapped = model if machine.world_size == 1 or config.shard else DistributedDataParallel(model)   # the one place that wraps
    loader = DataLoader(steps, sampler=range(first, total), batch_size=None, num_workers=config.workers,
                        worker_init_fn=ignore_sigterm, pin_memory=machine.device.type == "cuda")
    before = fingerprints(model) if first == 0 else None

    stopping, log = asked_to_stop(), open_log(log_path) if machine.rank == 0 else None

    def write(record):
        if log:
            log.write(json.dumps(record) + "\n")
            log.flush()

    # ---- the loop
    if first:
        say(f"resuming at step {first}")
    began, ended = time.time(), time.time()
    for step, micro in enumerate(loader, first):
        waited = time.time() - ended                     # for data
        real = sum(batch["attention_mask"].sum().item() for batch in micro)
        padded = sum(batch["attention_mask"].numel() for batch in micro)
        n_answer, real, padded, n_images, stop = machine.sum(
            sum((batch["labels"][:, 1:] != IGNORE).sum().item() for batch in micro), real, padded,
            sum(len(batch["pictures"]) for batch in micro), len(stopping))
        stop_on(n_answer == 0, machine, step, f"0 of {real:.0f} tokens are scored", micro, data)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total, config, group["peak"])
        try:
            with dropout_on(model.f_phi, config.seed, step, machine.rank):   # of adapters, if there are any
                loss, norm = backward(wrapped, micro, theta, optimizer, scaler, machine, n_answer)
        except Exception:
            print(f"rank {machine.rank}, step {step}: samples {[i for batch in micro for i in batch['ids']]}", file=sys.stderr)
            raise
        stop_on(not math.isfinite(loss) or loss == 0, machine, step, f"the loss is {loss}", micro, data)
        bad_norm = not math.isfinite(norm) and scaler.get_scale() <= 1      # fp16: the scaler skips the step and tries lower
        stop_on(bad_norm, machine, step, f"the gradient's norm is {norm}", micro, data)
        scaler.step(optimizer)
        scaler.update()
        if before and math.isfinite(norm):
            check_first_step(before, model, theta, min(group["lr"] for group in optimizer.param_groups))
            before = None
        seconds = time.time() - ended
        eta = timedelta(seconds=round((time.time() - began) / (step - first + 1) * (total - step - 1)))
        write({"step": step, "loss": loss, "lr": group["lr"], "seconds": seconds,
               "grad_norm": norm if math.isfinite(norm) else None,     # fp16: a skipped step; JSON has no infinity
               "tokens": real, "images": n_images, "answer_tokens": n_answer})
        if step % max(1, total // 50) == 0 or step == total - 1:
            say(f"step {step:>6}/{total} | loss {loss:8.4f} | lr {group['lr']:.2e} | norm {norm:8.3f} | "
                f"{real / seconds:8.0f} tok/s | {n_images / seconds:6.1f} img/s | wait {100 * waited / seconds:4.1f}% | "
                f"pad {100 * (1 - real / padded):4.1f}% | {peak_memory(machine.device) / 1e9:5.1f} GB | eta {eta}", flush=True)
        done = step + 1
        if done % config.save_every == 0 or done == total or stop:
            save_state(state_folder, done, config, theta, optimizer, scaler, checksum)
        if len(held_out) and (done % config.eval_every == 0 or done == total):
            record = evaluate(model, data, held_out, micro_batch_size, machine, done)
            write(record)
            say(f"  held out: loss {record['val_loss']:.4f}\n" + "\n".join(
                f"    {e['id']}: {e['answer']!r}, truth {e['truth']!r}" for e in record["answers"]), flush=True)
        if stop and done < total:
            say(f"stopped after step {step}; the same command with --resume goes on from here")
            return 128 + max(stopping, default=signal.SIGINT)
        ended = time.time()

    # ---- the result
    model.meta["steps"] = total
    save(config, machine, model, config.out)
    if machine.rank == 0:
        plot_losses(config.out)
        alone.close()
    say(f"saved {config.out} after {timedelta(seconds=round(time.time() - began))}")
    del wrapped                                          # else its destructor joins gloo's threads while it holds the GIL
    finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
