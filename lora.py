"""
Low-rank adapters of f_phi (LoRA, Hu et al., arXiv 2106.09685), LLaVA-1.5's cheaper stage 2: theta = {W, A, B}.

    W_0 x   becomes   W_0 x + (alpha / r) B A dropout(x)        W_0 frozen; A (r, in); B (out, r), zero at the start

OURS: written out, not taken from `peft`. That wraps f_phi, so that every name in a checkpoint changes, and needs `accelerate`;
the arithmetic is two lines. The folders that we write are PEFT's own, and the tests hold both against each other.
"""
import contextlib
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from checkpoint import save_settings, view_from

PEFT = "base_model.model.model."     # PEFT's own prefix, then that of the parts of LlavaForConditionalGeneration
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "use_rslora": False, "use_dora": False,
          "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "modules_to_save": ["multi_modal_projector"]}


class LoRA(nn.Linear):
    """A frozen linear layer with its adapter; `weight` and `bias` keep their names, so W_0 is saved and loaded as ever."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias                  # (out, in), (out,): the tensors themselves
        self.alpha, self.scale, self.dropout = alpha, alpha / rank, dropout
        like = {"dtype": torch.float32, "device": linear.weight.device}      # fp32: bf16 would round small steps away
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, self.in_features, **like), a=math.sqrt(5)))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))      # the start is W_0, bit for bit

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))     # (..., r)    A dropout(x)
        return super().forward(x) + F.linear(self.scale * low, self.lora_B.to(x.dtype))        # (..., out)

    def merged(self, W_0, A, B):
        """W_0 + (alpha / r) B A (out, in), summed in fp32, rounded once."""
        return (W_0 + self.scale * B @ A).to(W_0.dtype)


def adapters(module):
    """{name: LoRA layer} of all within `module`."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRA)}


def add_adapters(f_phi, rank, alpha, dropout=0.0):
    """Freeze f_phi and put an adapter on every linear layer but the head: LLaVA-1.5's with r 128, alpha 256, dropout 0.05."""
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"adapters: rank {rank} is at least 1, alpha {alpha} is above 0, dropout {dropout} is in [0, 1)")
    assert not adapters(f_phi), "f_phi has adapters already; merge(f_phi) makes them part of its weights"
    f_phi.requires_grad_(False)
    for name, layer in list(f_phi.base_model.named_modules()):               # base_model is all but the head
        if isinstance(layer, nn.Linear):
            f_phi.base_model.set_submodule(name, LoRA(layer, rank, alpha, dropout).eval())


@contextlib.contextmanager
def dropout_on(f_phi, *seed):
    """With this around forward and backward, the adapters drop out, though the model is in eval mode. `seed` is (seed, step,
    rank): the masks depend on it and the micro-batches' shapes alone. Sets torch's global seed; a no-op without adapters."""
    layers = adapters(f_phi).values()
    if layers:
        torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer in layers:
            layer.eval()


@torch.no_grad()
def merge(f_phi):
    """Put W_0 + (alpha / r) B A in W_0's place and take the adapters away: plain linear layers again."""
    for name, layer in adapters(f_phi.base_model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        plain.weight.copy_(layer.merged(layer.weight, layer.lora_A, layer.lora_B))   # in place: no second f_phi in memory
        f_phi.base_model.set_submodule(name, plain.eval())


@torch.no_grad()
def merged_state(model, state):
    """The model's `state` dict as it would be after `merge`, for a model that trains on; what is merged lies on the CPU."""
    state = dict(state)
    for name, layer in adapters(model).items():
        W_0, A, B = (state.pop(f"{name}.{x}") for x in ("weight", "lora_A", "lora_B"))
        state[f"{name}.weight"] = layer.merged(W_0, A, B).cpu()
    return state


def peft_state(model, state):
    """{PEFT's name: tensor} of what LoRA trains, from the model's `state` dict: A and B of each layer, and all of W."""
    mine = {f"{PEFT}language_model.{name}.{x}.weight": state[f"f_phi.{model.f_phi.base_model_prefix}.{name}.{x}"]
            for name in adapters(model.f_phi.base_model) for x in ("lora_A", "lora_B")}
    return mine | {PEFT + k: v for k, v in model.to_hf_keys(state).items() if k.startswith("multi_modal_projector.")}


def save_adapter(model, folder, base, state=None):
    """Write adapters and W as a folder for `PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base),
    folder)`. vLLM takes no adapter that brings modules of its own, such as W: it needs the merged checkpoint.

    Its processor, tokenizer and template are in it, too: those of `base`, a stage 1, know neither how pictures are looked at
    now nor any turns. `base` is the checkpoint folder that training started from.
    """
    layers = adapters(model.f_phi.base_model)
    names, one = "|".join(sorted({name.split(".")[-1] for name in layers})), next(iter(layers.values()))
    config = CONFIG | {"base_model_name_or_path": os.path.abspath(base), "r": len(one.lora_A), "lora_alpha": one.alpha,
                       "lora_dropout": one.dropout, "inference_mode": True,
                       "target_modules": rf"model\.language_model\..*\.({names})"}    # names alone would match CLIP's layers
    os.makedirs(folder, exist_ok=True)
    weights = peft_state(model, state or model.state_dict())
    save_file(weights, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    save_settings(folder, model.tokenizer, model.view, model.eos_ids)
    for file, content in (("minllava.json", model.meta), ("adapter_config.json", config)):   # that last: with it, it is whole
        with open(os.path.join(folder, file), "w") as f:
            json.dump(content, f, indent=2)


def is_adapter(folder):
    """Whether a folder holds an adapter alone."""
    there = lambda file: os.path.isfile(os.path.join(folder, file))
    return there("adapter_config.json") and not there("config.json")


def base_of(folder):
    """The checkpoint folder that an adapter folder belongs to; FileNotFoundError if either is not there."""
    if not os.path.isfile(path := os.path.join(folder, "adapter_config.json")):
        raise FileNotFoundError(f"{folder}: no adapter_config.json; pass an adapter folder, as train.py --lora_rank writes it")
    with open(path) as f:
        base = json.load(f).get("base_model_name_or_path") or ""
    if not os.path.isfile(os.path.join(base, "config.json")):
        raise FileNotFoundError(f"{folder}: an adapter without its base, {base!r} is no checkpoint folder here; put its place "
                                f"into base_model_name_or_path of {path}, or pass a merged checkpoint")
    return base


def load_adapter(model, folder):
    """Put a saved adapter on `model`, its base; W, tokenizer and the way of looking become the adapter's. Returns the model.

    ValueError for an adapter of another kind, or of another model; FileNotFoundError where its weights are not there.
    """
    with open(path := os.path.join(folder, "adapter_config.json")) as f:
        config = json.load(f)
    if differ := [f"{k} {config[k]!r} instead of {v!r}" for k, v in CONFIG.items() if config.get(k, v) != v]:
        raise ValueError(f"{path}: an adapter of another kind, {', '.join(differ)}; merge it with PEFT and pass that folder")
    if not os.path.isfile(weights := os.path.join(folder, "adapter_model.safetensors")):
        raise FileNotFoundError(f"{weights}: no such file; copy the adapter's folder again, or pass a merged checkpoint")
    add_adapters(model.f_phi, config["r"], config["lora_alpha"], config["lora_dropout"])
    state, mine = load_file(weights), peft_state(model, model.state_dict())
    theirs, ours = ({(k, tuple(v.shape)) for k, v in tensors.items()} for tensors in (state, mine))
    if differ := sorted(theirs ^ ours):
        raise ValueError(f"{folder}: an adapter of another model; pass its base, {config['base_model_name_or_path']!r}. Of its "
                         f"weights {len(theirs - ours)} do not fit and {len(ours - theirs)} are missing, e.g. {differ[:2]}")
    W = {k.removeprefix(PEFT): state.pop(k) for k in list(state) if "multi_modal_projector" in k}
    model.load_state_dict(model.from_hf_keys(model.to_hf_keys() | W, folder))
    for key, value in state.items():
        mine[key].copy_(value)                           # mine are the parameters' own storage
    if os.path.isfile(path := os.path.join(folder, "minllava.json")):        # PEFT alone writes none
        with open(path) as f:
            model.meta = json.load(f)
        model.look(view_from(model.meta, model.view.size, model.view.patch, folder))
        model.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model
