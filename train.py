"""
How it is trained (Sec. 4.2): one loop for both stages.

    torchrun --nproc_per_node=8 train.py --stage 1                      # W alone, on captions
    torchrun --nproc_per_node=8 train.py --stage 2 --init out/stage1    # W and f_phi, instructions

The defaults are the paper's recipe at 7B. A flag that is typed wins over the recipe, the recipe
over the default. parts/ranks.py has devices and processes, parts/run.py the folder and its states.
"""
import dataclasses
import functools
import math
import zlib

import numpy as np
import torch

from data import Conversations, Steps, collate, micro_batches, show
from model import LLaVA
from parts import check, checkpoints, lora
from parts.files import brief_instructions, check_least, run_main, typed_flags
from parts.ranks import ANSWERING, DTYPES, RECOMPUTED, Machine, Optimizer, groups_of, share_of
from parts.records import Records
from parts.run import TRACKERS, Run, config_table, dry_run, theta_table
from parts.templates import TEMPLATES, choose_template
from parts.views import ASPECTS, set_view

# -----------------------------------------------------------------------------
# The recipes: what each system trains on, and how. They win over the defaults of Config.

CC3M = "data/LLaVA-CC3M-Pretrain-595K"
CLIP = "openai/clip-vit-large-patch14"                   # 224 px: N = 256 visual tokens
CLIP_336 = "openai/clip-vit-large-patch14-336"           # N = 576
SIGLIP_2 = "google/siglip2-base-patch16-512"             # N = 1024

PAPER = dict(                                            # rates, epochs and batches: Sec. 5
    vision=CLIP, template="llava_v0", image_position="random",
    stage1=dict(data=[f"{CC3M}/chat.json"], images=f"{CC3M}/images",
                epochs=1, lr=2e-3, global_batch_size=128),
    # OFFICIAL: the later "full schedule" script trains with batch 128; the paper says 32
    stage2=dict(data=["data/LLaVA-Instruct-150K/llava_instruct_150k.json"], epochs=3, lr=2e-5,
                images="data/coco/train2017", global_batch_size=32))     # 158K, though named 150k
SCIENCEQA = dict(PAPER, stage2=dict(
    PAPER["stage2"], data=["out/scienceqa/train.json"], epochs=12,
    images="data/scienceqa/images/train", image_position="first"))       # OURS: as sample.py asks
V1_5 = dict(                                             # Diss. Sec. 4.3
    vision=CLIP_336, projector="mlp2x_gelu", template="vicuna_v1", image_position="first",
    stage1=dict(data=["data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"], template="plain",
                images="data/LLaVA-Pretrain", epochs=1, lr=1e-3, global_batch_size=256),
    stage2=dict(data=["data/llava_v1_5_mix665k.json"], images="data", aspect="pad",
                epochs=1, lr=2e-5, global_batch_size=128))
V1_5_LORA = dict(V1_5, stage2=dict(V1_5["stage2"], lr=2e-4, lr_W=2e-5, lora_rank=128))
# OURS: HD's code and weights were not released; its stage 1 is that of 1.5, at 224 pixels
HD = dict(V1_5, vision=CLIP, stage2=dict(V1_5["stage2"], aspect="hd", max_length=4096))
# Diss. Sec. 4.7. OURS: its 760K samples were not released in full. OFFICIAL: g trains, too
NEXT_FROZEN = dict(V1_5, max_length=4096, stage2=dict(
    V1_5["stage2"], data=["data/llava_next.json"], aspect="anyres"))
NEXT = dict(NEXT_FROZEN, stage2=dict(NEXT_FROZEN["stage2"], lr_g=2e-6))
TOY = dict(                                              # OURS: the paper in miniature (toy/)
    vision="toy/pretrained/clip", llm="toy/pretrained/llm", template="llava_v0", workers=0,
    images="out/toy/world/images", image_position="first", max_length=512, val_samples=64,
    stage1=dict(data=["out/toy/stage1.json"], epochs=1, lr=1e-2, global_batch_size=8),
    stage2=dict(data=["out/toy/instruct/instruct.json"], epochs=3, lr=5e-4, global_batch_size=32))
TOY_1_5 = dict(TOY, projector="mlp2x_gelu", stage2=dict(TOY["stage2"], aspect="pad"))

RECIPES = {
    # OURS: the paper's Vicuna v0 is a delta on LLaMA; v1.3 is the closest that loads by its name
    "llava-7b": dict(PAPER, llm="lmsys/vicuna-7b-v1.3"),
    "llava-13b": dict(PAPER, llm="lmsys/vicuna-13b-v1.3"),
    "scienceqa-7b": dict(SCIENCEQA, llm="lmsys/vicuna-7b-v1.3"),
    "scienceqa-13b": dict(SCIENCEQA, llm="lmsys/vicuna-13b-v1.3"),
    "llava-1.5-7b": dict(V1_5, llm="lmsys/vicuna-7b-v1.5"),
    "llava-1.5-13b": dict(V1_5, llm="lmsys/vicuna-13b-v1.5"),
    "llava-1.5-7b-lora": dict(V1_5_LORA, llm="lmsys/vicuna-7b-v1.5"),
    "llava-1.5-13b-lora": dict(V1_5_LORA, llm="lmsys/vicuna-13b-v1.5"),
    "llava-1.5-hd-13b": dict(HD, llm="lmsys/vicuna-13b-v1.5"),
    "llava-next-vicuna-7b": dict(NEXT, llm="lmsys/vicuna-7b-v1.5"),
    "llava-next-vicuna-7b-frozen": dict(NEXT_FROZEN, llm="lmsys/vicuna-7b-v1.5"),
    "llava-next-vicuna-13b": dict(NEXT, llm="lmsys/vicuna-13b-v1.5"),
    "llava-next-mistral-7b": dict(NEXT, llm="mistralai/Mistral-7B-Instruct-v0.2",
                                  template="mistral_instruct"),
    "llava-next-yi-34b": dict(NEXT, llm="NousResearch/Nous-Hermes-2-Yi-34B",
                              template="chatml_direct"),
    "small": dict(V1_5, vision=SIGLIP_2, llm="Qwen/Qwen3-0.6B", template="qwen_3"),
    "toy": TOY,
    "toy-1.5": TOY_1_5,
    "toy-hd": dict(TOY_1_5, stage2=dict(TOY["stage2"], aspect="hd")),
    "toy-next": dict(TOY_1_5, stage2=dict(TOY["stage2"], aspect="anyres", lr_g=5e-5)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    recipe: str = "llava-7b"            # a row of RECIPES
    stage: int = 1                      # 1: theta = {W}; 2: theta = {W, phi}
    data: list[str] = ()                # JSON, Parquet, tar; FILE=0.5: half. COURSE: Diss. Sec. 4.5
    images: str = None                  # the folder that image names are relative to
    vision: str = None                  # g: hub id or folder of a CLIP or SigLIP
    llm: str = None                     # f_phi: hub id or folder of a language model
    init: str = None                    # a checkpoint; "none" skips stage 1 (COURSE: Table 8)
    out: str = None                     # output folder; out/stage1 or out/stage2
    resume: bool = False                # go on where a run with the same flags was stopped
    template: str = "auto"              # auto: the checkpoint's unless plain, or else f_phi's own
    feature_layer: int = -2             # COURSE: Table 8, -2 "before the last layer" against -1
    projector: str = "linear"           # W: linear, or mlp2x_gelu (LLaVA-1.5)
    aspect: str = "auto"                # how pictures are seen, parts/views.py; auto: g's own way
    max_length: int = 2048              # tokens, with visual ones; longer samples lose last turns
    skip_bad: bool = False              # leave bad samples out and count them, rather than stop
    epochs: int = 1
    max_steps: int = None               # stop earlier; the schedule ends there, too
    lr: float = 2e-3                    # AdamW's peak rate; each recipe has its own in each stage
    lora_rank: int = 0                  # COURSE: adapters train instead of f_phi; parts/lora.py
    global_batch_size: int = 128        # samples a step over all ranks, whatever the machine
    micro_batch_tokens: int = 8192      # of a forward pass on one rank; more is accumulated
    seed: int = 42
    val_samples: int = 0                # held out, for a validation loss; the paper trains on all
    save_every: int = 500               # steps between two states to go on from, and validations
    keep: int = 1                       # how many of these states are kept
    workers: int = 4                    # processes that decode pictures, for each rank
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # of compute: bf16, fp16, fp32; nf4: QLoRA's f_phi in 4 bits
    shard: bool = False                 # weights, gradients, moments are spread over all ranks
    checkpoint_activations: str = "none"    # or all, every_2: decoder layers run again
    compile: bool = False               # the decoder layers, by torch.compile
    kernels: str = "torch"              # or liger: fused ones, on CUDA, where it is installed
    track: str = None                   # wandb, trackio or tensorboard; nothing is sent without it
    dry_run: bool = False               # some steps on the longest samples: memory, and what fits
    image_position: str = "random"      # COURSE: random, first, as_written; see data.arrange
    lr_W: float = None                  # W's own peak
    lr_g: float = None                  # stage 2: g trains, too, at this rate (LLaVA-NeXT)

    NOT_FLAGS = ("image_position", "lr_W", "lr_g")       # only a recipe's row says these
    CHOICES = {"recipe": list(RECIPES), "stage": [1, 2], "template": ["auto", *TEMPLATES],
               "projector": ["linear", "mlp2x_gelu"], "aspect": ["auto", *ASPECTS],
               "device": ["auto", "cuda", "mps", "cpu"], "dtype": ["auto", *DTYPES, "nf4"],
               "checkpoint_activations": list(RECOMPUTED), "kernels": ["torch", "liger"],
               "track": list(TRACKERS)}


def resolve(argv):
    """A command line to (Config, {field: where its value came from})."""
    typed = typed_flags(Config, argv, "Train LLaVA.")
    stage = typed.get("stage", Config.stage)
    recipe = dict(RECIPES[typed.get("recipe", Config.recipe)], out=f"out/stage{stage}")
    stages = recipe.pop("stage1"), recipe.pop("stage2")
    recipe |= stages[stage - 1]
    has_init = typed.get("init", "none") != "none"       # "none" is typed, to skip stage 1
    if has_init:                         # the checkpoint brings its own parts
        recipe = {flag: recipe[flag] for flag in recipe if flag not in ("vision", "llm")}
    if (has_init or "llm" in typed) and recipe["template"] != "plain":
        recipe["template"] = "auto"      # a recipe's fits its own language model; plain fits any
    if typed.get("lora_rank"):
        recipe.pop("lr_g", None)         # beside adapters, g is frozen
    config = Config(**{**recipe, **typed})
    origin = {field.name: "default" for field in dataclasses.fields(Config)}
    origin |= dict.fromkeys(recipe, "recipe") | dict.fromkeys(typed, "command line")
    check_least(config, max_length=1, epochs=1, max_steps=0, lr=0, lora_rank=0, save_every=1,
                global_batch_size=1, micro_batch_tokens=1, val_samples=0, keep=1, workers=0)

    if stage == 2 and config.init is None:
        raise ValueError("stage 2 starts from stage 1: --init out/stage1; or --init none")
    lora.check_flags(config)
    if has_init and {"vision", "llm"} & typed.keys():
        raise ValueError(f"--vision and --llm do nothing: --init {config.init} has its own")
    return config, origin


# -----------------------------------------------------------------------------
# Model and data


def build_model(config, machine):
    """The model on its device, theta, template and view. ValueError if --init does not fit them."""
    torch.manual_seed(config.seed)       # W's initial values
    if config.init in (None, "none"):
        model = LLaVA.from_parts(config.vision, config.llm, dtype=None,
                                 feature_layer=config.feature_layer, projector=config.projector)
    else:
        model = LLaVA.from_pretrained(config.init, dtype=None)
        for flag in ("feature_layer", "projector"):
            found = getattr(model, flag)
            if found != getattr(config, flag):
                raise ValueError(f"--init {config.init} has {flag} {found}: take --{flag} {found}")
    had_newline = model.newline is not None
    view = set_view(model, config.aspect)        # tiles add model.newline, which may train
    model.set_stage(config.stage, train_g=bool(config.lr_g))     # sets theta; `place` returns it
    if config.lora_rank:
        lora.adapt(model, config.lora_rank, had_newline)
    theta = machine.place(model, config.checkpoint_activations, config.compile, config.kernels)
    template = choose_template(config.template, model)
    model.meta |= {"template": template.name, **view.meta}
    model.meta |= {key: getattr(config, key) for key in ("stage", "recipe", "init", "seed", "data")}
    return model, theta, template, view


def build_data(config, machine, model, template, view):
    """The checked data set, its samples' lengths, indices to train on and held out, report lines.
    Raises ValueError with file, index and id of what is wrong. Rank 0 checks, the others wait."""
    questions = brief_instructions() if config.stage == 1 else None      # Sec. 4.2
    records = Records(config.data, config.seed)
    data = Conversations(records, config.images, model.tokenizer, template, view,
                         config.max_length, config.image_position, questions, config.seed)
    found = check.inspect_data(data, config.workers) if machine.rank == 0 else None
    problems, table = machine.gather(found)[0]
    check.refuse(data, problems, table, config.skip_bad,
                 context=model.f_phi.config.max_position_embeddings)
    train_on, held_out = check.hold_out(records, problems, config.val_samples, config.seed)
    report = check.report(data, problems, table, stats=True)
    return data, table[:, check.TOKENS], train_on, held_out, report


# -----------------------------------------------------------------------------
# The loop


def lr_at(step, total, warmup_ratio=0.03):
    """The share of the peak rate: linear warm-up over the first 3%, then cosine to 0 (App. C)."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)     # OFFICIAL: from 0, so that step 0 changes nothing
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def update(model, batches, machine, optimizer, n_answer):
    """One step on a global batch. Returns its loss per answer token, Eq. (3), and the norm of the
    gradient.

    Each loss is divided by n_answer, the answer tokens of the global batch, counted before any
    forward pass. DistributedDataParallel averages over the ranks, hence the factor world_size.
    """
    optimizer.zero_grad()
    total = 0.0
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1      # gradients of the ranks meet once, at the last one
        with machine.forward(model, sync=is_last):
            loss, _ = model(**machine.to_device(batch))
            optimizer.backward(loss * machine.world_size / n_answer)
        total = total + loss.detach()    # still on the device, for which the host need not wait
    loss, norm = optimizer.step(total / n_answer)    # hands the loss through; OFFICIAL: no clipping
    return machine.sum(loss), norm


@torch.no_grad()
def held_out_loss(machine, model, data, held_out, lengths, budget):
    """The loss per answer token of samples that no step trains on; of all ranks."""
    total = n = 0
    for group in micro_batches(held_out, lengths, 0, budget, machine.world_size, machine.rank):
        batch = collate([data.sample(*which) for which in group], data.view)
        with machine.forward(model):
            loss, count = model(**machine.to_device(batch))
        total += loss.item()
        n += count
    total, n = machine.sum(total, n)
    return total / n


def validate(run, step, model, data, held_out, lengths):
    """Log the loss on held-out samples, and answers to the first three of them."""
    if not len(held_out):
        return
    machine = run.machine
    loss = held_out_loss(machine, model, data, held_out, lengths, run.config.micro_batch_tokens)
    prompts, truths = zip(*[data.question(int(i)) for i in held_out[:3]], strict=True)
    batch = collate(prompts, data.view, side="left")
    with machine.forward(model):
        answers = model.generate(**machine.to_device(batch, ANSWERING), stop=[data.template.STOP],
                                 max_new_tokens=64)
    answers = [{"id": where, "truth": truth, "answer": answer}
               for where, truth, answer in zip(batch["where"], truths, answers, strict=True)]
    machine.print0(f"  held out: loss {loss:.4f}", *[f"    {row}" for row in answers])
    run.log({"step": step, "val_loss": loss, "answers": answers})


def train(config, origin, machine, run):
    """One run, from the banner to the checkpoint. Returns the exit code."""
    model, theta, template, view = build_model(config, machine)
    data, lengths, train_on, held_out, report = build_data(config, machine, model, template, view)
    share = share_of(config.global_batch_size, machine.world_size)       # samples of a rank
    plan = Steps(data, train_on, lengths, config.global_batch_size, config.micro_batch_tokens,
                 machine.world_size, machine.rank)
    total = plan.per_epoch * config.epochs
    total = total if config.max_steps is None else min(total, config.max_steps)

    def render_first(batch):             # errors show it, too
        text = show(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), data.tokenizer)
        return f"template {template.name}; one sample, what is scored in green or «»:\n{text}"

    # the banner: what a reader should see before step 0
    machine.print0(*config_table(config, origin), *theta_table(model, theta), *report)
    machine.print0(f"{len(train_on)} samples train, {len(held_out)} are held out",
                   f"batch: {config.global_batch_size} over {machine.world_size} ranks; "
                   f"{plan.per_epoch} steps an epoch, {total} in all\n")
    machine.print0(render_first(collate([data.sample(int(train_on[0]))], view)))

    peaks = {"W": config.lr_W or config.lr, "g": config.lr_g,
             "f_phi": config.lr, "newline": config.lr}
    optimizer = Optimizer(groups_of(theta, peaks), machine)      # AdamW, no weight decay (App. C)
    if config.dry_run:
        order = train_on[np.argsort(-lengths[train_on])]
        take_step = functools.partial(longest_step, model, data, order, machine, optimizer)
        most = share * int(lengths[order[0]])        # tokens, with all of it at once
        machine.print0(*dry_run(take_step, config.micro_batch_tokens, most, machine))
        return 0

    save = functools.partial(save_model, machine, model)
    run.watch(model, theta, optimizer, zlib.crc32(lengths.tobytes(), data.records.checksum))
    # a full disk is found out before training
    run.rehearse(save, functools.partial(LLaVA.from_pretrained, dtype=None))
    first = run.resume()
    parallel = machine.wrap(model)       # gradients are averaged over the ranks

    for step, batches in run.steps(plan, first, total, render_first):
        n_answer = machine.sum(count_answer_tokens(batches))
        optimizer.set_lr(lr_at(step, total))
        loss, norm = update(parallel, batches, machine, optimizer, n_answer)

        run.check_step(loss, norm)       # finite; frozen is frozen, and the rest has moved
        run.log_step(loss, norm, answer_tokens=n_answer)
        if run.is_due():                 # the state comes last, so that a kill loses no record
            validate(run, step + 1, model, data, held_out, lengths)
            run.save_state()
        if run.stopping:                 # by Ctrl-C or a scheduler
            return run.goodbye()

    model.meta["steps"] = total
    run.finish(save)
    return 0


def count_answer_tokens(batches):
    return sum(len(batch["answer_index"]) for batch in batches)


def longest_step(model, data, order, machine, optimizer, tokens):
    """One step of --dry_run: two micro-batches of the longest samples, about `tokens` each; only
    the second meets gradients in memory. Returns its tokens; order (samples,): longest first."""
    n = max(1, tokens // len(data.sample(int(order[0]))["input_ids"]))
    batch = collate([data.sample(int(i)) for i in order[:n]], data.view)
    update(model, [batch, batch], machine, optimizer, count_answer_tokens([batch, batch]))
    return batch["input_ids"].numel()


def save_model(machine, model, folder):
    state = machine.gathered_state(model)        # all ranks take part, rank 0 has it
    if machine.rank == 0:
        model.save_pretrained(folder, machine.dtype, state)


def main(argv=None):
    config, origin = checkpoints.inherit(*resolve(argv))     # of a stage-2 --init: layer, view, W
    machine = Machine(config.device, config.dtype, config.shard)
    with Run(config, machine, writes=not config.dry_run) as run:
        return train(config, origin, machine, run)


if __name__ == "__main__":
    run_main(main)
