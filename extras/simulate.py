"""
Peak memory and FLOPs of a training step at any size, by a step that computes nothing.

    python -m extras.simulate step --recipe llava-7b --stage 2 --ranks 8     one rank's peak
    python -m extras.simulate hours                                          docs/speed.md's table

It is a SIMULATION: tensors without numbers (torch's FakeTensorMode) and a process group without
processes run train.py's own step; storages that are alive are added up, and operations counted by
torch's formulas. Not in it are what CUDA itself takes (1 to 2 GB), what its allocator loses,
--compile and --kernels.
"""
import os
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.models.llama import modeling_llama

from data import collate
from extras import bench
from parts import lora
from parts.files import run_command, run_main
from parts.ranks import RECOMPUTED, Machine, Optimizer, groups_of, init_device_mesh, local_shard
from parts.views import set_view, view_of
from train import RECIPES, count_answer_tokens, resolve, update

try:
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError:                      # they are torch's own, and may go
    FakeTensorMode = None

CARDS = {"A100": (312e12, 0.30, 0.38), "H100": (989e12, 0.22, 0.30)}     # peak, MFU from .. to
PICTURE = (640, 480)                     # pixels of COCO's
SAMPLES = {                              # of the recipes' data
    "data/LLaVA-CC3M-Pretrain-595K/chat.json": 595_375,
    "data/LLaVA-Instruct-150K/llava_instruct_150k.json": 157_712,
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": 558_128,
    "data/llava_v1_5_mix665k.json": 665_298,
    "data/llava_next.json": 760_000}     # OURS: about


@dataclass(frozen=True)
class Simulation:
    recipe: str = "llava-7b"            # a row of train.py's RECIPES
    stage: int = 2
    ranks: int = 8                      # with more than one, --shard
    micro_batch_tokens: int = 8192
    micro_batches: int = 2              # a step accumulates over so many
    length: int = None                  # tokens of every sample; default: --max_length
    answers: int = 128                  # of them are scored
    checkpoint_activations: str = "none"

    CHOICES: ClassVar = {"recipe": [name for name in RECIPES if "llava" in name],
                         "stage": [1, 2], "checkpoint_activations": list(RECOMPUTED)}


class Meter(TorchDispatchMode):
    """Bytes of the storages of all tensors that are alive, their `peak`, and FLOPs."""

    def __init__(self):
        super().__init__()
        self.sizes = {}                  # of storages, by address
        self.now = self.peak = self.flops = 0

    def resize(self, key, size):
        self.now += size - self.sizes.pop(key, 0)
        self.peak = max(self.peak, self.now)
        self.sizes[key] = size

    def track(self, tensor):
        storage = local_shard(tensor).untyped_storage()
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.forget, storage._cdata)
            self.resize(storage._cdata, storage.nbytes())

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0                   # a number that the step asks for
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor)
        return result


def flash_attention(q, k, v, dropout_p=0.0, is_causal=False, scale=None, **_):
    """SDPA as a GPU's flash kernel does it: nothing of T x T is kept."""
    q, k, v = (x.bfloat16() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, dropout_p, is_causal, scale=scale)[0]


def patches(meter, mesh):
    """What fake tensors cannot do, replaced; each returns a context."""
    resize = torch.UntypedStorage.resize_

    def resize_storage(storage, size):   # FSDP empties storages; that is no operation
        resize(storage, size)
        if storage._cdata in meter.sizes:
            meter.resize(storage._cdata, size)
        return storage

    return [patch.object(torch.UntypedStorage, "resize_", resize_storage),
            patch.object(F, "scaled_dot_product_attention", flash_attention),
            patch.object(torch.nn.Module, "to", return_value=None),      # all is in its place
            patch.object(modeling_llama, "create_causal_mask", return_value=None),
            patch("parts.ranks.init_device_mesh", return_value=mesh)]


def pixels_of_g(config):
    return 336 if RECIPES[config.recipe]["vision"].endswith("336") else 224


def build(config, settings):
    """A LLaVA of a recipe's shapes and its view, as train.build_model makes it."""
    llm = RECIPES[config.recipe]["llm"].lower()
    # a Mistral says 7B, too
    size = next(name for name in ("mistral", "34b", "13b", "7b") if name in llm)
    model = bench.random_llava(bench.Config(size=size), settings.projector,
                               image_size=pixels_of_g(config))
    view = set_view(model, settings.aspect)
    model.set_stage(settings.stage, train_g=bool(settings.lr_g))
    if settings.lora_rank:
        lora.adapt(model, settings.lora_rank, had_newline=model.newline is not None)
    return model, view


def settings_of(config):
    """A recipe's settings, as train.py resolves them."""
    argv = ["--recipe", config.recipe, "--stage", str(config.stage), "--init", "out/stage1"]
    return resolve(argv)[0]


def batch_of(model, view, config):
    """As many samples as the budget holds, each with a picture, its last tokens scored."""
    rng = np.random.default_rng(0)
    before = config.length - view.tokens(*PICTURE) - config.answers
    samples = [bench.random_sample(model, view, [(before, config.answers)], rng, *PICTURE)
               for _ in range(max(1, config.micro_batch_tokens // config.length))]
    return collate(samples, view)


def simulate(config, settings, build_model=build):
    """(bytes at the peak, FLOPs, tokens) of one rank's step."""
    if FakeTensorMode is None:
        raise ValueError("this torch lacks the private hooks (FakeTensorMode, FakeStore) that a "
                         "simulation needs; nothing is simulated. --dry_run measures real steps")
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(config.ranks)}
    dist.init_process_group("fake", rank=0, world_size=config.ranks, store=FakeStore())
    meter = Meter()
    # a mesh has real numbers in it
    contexts = patches(meter, init_device_mesh("cpu", (config.ranks,)))
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        for context in [*contexts, FakeTensorMode(allow_non_fake_inputs=True), meter]:
            stack.enter_context(context)
        machine = Machine("cpu", "bf16", shard=config.ranks > 1)
        model, view = build_model(config, settings)
        theta = machine.place(model, config.checkpoint_activations)
        rates = dict.fromkeys(("W", "g", "f_phi", "newline"), 1e-5)
        optimizer = Optimizer(groups_of(theta, rates), machine)
        optimizer.set_lr(1.0)
        with unset_fake_temporarily():
            batch = batch_of(model, view, config)
        for p in model.parameters():
            meter.track(p)
        meter.peak = meter.now
        batches = [batch] * config.micro_batches
        update(model, batches, machine, optimizer, count_answer_tokens(batches))
    return meter.peak, meter.flops, batch["input_ids"].numel() * len(batches)


def print_step(config):
    """What one rank's step needs."""
    settings = settings_of(config)
    config = replace(config, length=config.length or settings.max_length)
    peak, flops, tokens = simulate(config, settings)
    print(f"SIMULATED {config}: {tokens} tokens, {peak / 1e9:.1f} GB at the peak, "
          f"{flops / 1e12:.0f} TFLOP")


def print_hours(config):
    """The table of docs/speed.md: a run's FLOPs, and its hours on eight GPUs."""
    print("| recipe | stage | tokens/sample | PFLOP | 8 x A100 | 8 x H100 |\n|" + " --- |" * 6)
    for recipe in Simulation.CHOICES["recipe"]:
        for stage in (1, 2):
            row = replace(config, recipe=recipe, stage=stage, ranks=1, micro_batch_tokens=1,
                          micro_batches=1)
            settings = settings_of(row)
            if settings.data[0] in SAMPLES:
                print(hours_row(row, settings), flush=True)


def hours_row(config, settings):
    """A recipe's row, of one sample of its mean length."""
    aspect = "crop" if settings.aspect == "auto" else settings.aspect
    N = view_of(aspect, pixels_of_g(config)).tokens(*PICTURE)
    drawn, lengths = bench.draw_epoch("7b", config.stage, N, np.random.default_rng(0))
    answers = np.mean([sum(answer for _, answer in turns) for turns in drawn])
    config = replace(config, length=round(lengths.mean()), answers=round(answers))
    _, flops, _ = simulate(config, settings)
    flops *= SAMPLES[settings.data[0]] * settings.epochs
    cells = [config.recipe, config.stage, config.length, f"{flops / 1e15:,.0f}"]
    for speed, least, most in CARDS.values():
        hours = flops / 8 / speed / 3600
        cells.append(f"{hours / most:.1f} to {hours / least:.1f}")
    return "| " + " | ".join(map(str, cells)) + " |"


COMMANDS = {"step": (print_step, Simulation), "hours": (print_hours, Simulation)}


def main(argv=None):
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
