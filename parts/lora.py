"""
Low-rank adapters of f_phi (LoRA, Hu et al., arXiv 2106.09685): LLaVA-1.5's cheaper stage 2, with
theta = {W, A, B}.

    W_0 x   becomes   W_0 x + (alpha / r) B A dropout(x)

    W_0 (out, in)  frozen      A (r, in)  starts at random      B (out, r)  starts at zero

W_0 may be held in 4 bits (QLoRA, Dettmers et al., arXiv 2305.14314), by bitsandbytes: NF4, in
blocks of 64, whose scales are quantised, too; 4.127 bits a weight. Products are made with W_0
rounded so, in x's number format; a checkpoint is A and B merged with the W_0 they started from.

OURS: written out, not taken from `peft`, which wraps f_phi, so that every name in a checkpoint
changes; the arithmetic is two lines. The folders of parts/checkpoints.py are PEFT's own, and the
tests hold both against each other.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.files import library


class LoRA(nn.Linear):
    """A frozen linear layer with its adapter.

    `weight` and `bias` keep their names, so that W_0 is saved and loaded as ever.
    """

    def __init__(self, linear, rank, alpha, dropout):
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight = linear.weight                      # (out, in), the tensor itself
        self.bias = linear.bias                          # (out,)
        self.blocks = None                               # of a W_0 in 4 bits: shape, scales
        self.alpha = alpha
        self.scale = alpha / rank
        self.dropout = dropout
        # A and B are fp32 on a bf16 W_0, too: bf16 would round small steps away.
        device = linear.weight.device
        A = torch.empty(rank, self.in_features, dtype=torch.float32, device=device)
        B = torch.zeros(self.out_features, rank, dtype=torch.float32, device=device)
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B = nn.Parameter(B)                    # B = 0: the start is W_0, bit for bit

    def forward(self, x):
        x_dropped = F.dropout(x, self.dropout, torch.is_grad_enabled())      # while it trains
        low = F.linear(x_dropped, self.lora_A.to(x.dtype))                   # (..., r)    A x
        update = F.linear(self.scale * low, self.lora_B.to(x.dtype))         # (..., out)
        return self.frozen_product(x) + update

    def frozen_product(self, x):
        if self.blocks is None:
            return super().forward(x)                                        # (..., out)  W_0 x
        x = x.to(self.blocks.dtype)
        return bitsandbytes().matmul_4bit(x, self.weight.t(), self.blocks, bias=self.bias)

    def hold_in_4_bits(self, device, dtype):
        """Put W_0, rounded to `dtype`, on a device in 4 bits: `weight` is then a column of bytes,
        two weights in each. A layer whose rows are no whole blocks stays as it is."""
        if self.in_features % 64:
            return
        packed, self.blocks = bitsandbytes().functional.quantize_4bit(
            self.weight.data.to(device, dtype), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(packed, requires_grad=False)


def merge(W_0, A, B, scale):
    """W_0 + scale B A, (out, in), in W_0's format: summed in fp32, rounded once."""
    return (W_0.float() + scale * (B.float() @ A.float())).to(W_0.dtype)


def bitsandbytes():
    """The library that W_0 in 4 bits needs. Raises ValueError if it is not installed."""
    return library("bitsandbytes", "--dtype nf4", "bitsandbytes")


def adapters(module):
    """{name: LoRA layer} of all within `module`."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRA)}


def check_flags(config):
    """Raises ValueError for flags of train.Config that do not go together."""
    if config.lora_rank and config.stage == 1:
        raise ValueError("--lora_rank does nothing in stage 1, where W alone trains")
    if config.lora_rank and config.init == "none":
        raise ValueError("--lora_rank trains W and adapters alone, beside a checkpoint that they "
                         "belong to: --init out/stage1")
    if config.dtype == "nf4" and not config.lora_rank:
        raise ValueError("--dtype nf4 holds what adapters leave frozen in 4 bits: it goes with "
                         "--stage 2 --lora_rank N, e.g. --lora_rank 128")
    if config.dtype == "nf4" and config.shard:
        raise ValueError("--dtype nf4 is not sharded: leave --shard out, or take --dtype bf16")


def add_adapters(f_phi, rank, alpha, dropout=0.0):
    """Freeze f_phi and put an adapter on every linear layer but the head.

    LLaVA-1.5 has rank 128, alpha 256, dropout 0.05.
    """
    f_phi.requires_grad_(False)
    body = f_phi.base_model                              # all but the head
    for name, layer in list(body.named_modules()):
        if isinstance(layer, nn.Linear):
            body.set_submodule(name, LoRA(layer, rank, alpha, dropout).eval())


def adapt(model, rank, had_newline):
    """Train adapters of f_phi and W (Diss. Sec. 4.3); row ends of tiles stay as they are.

    had_newline   the checkpoint of the model has learnt to see in tiles
    Raises ValueError where tiles would have to be learnt, too.
    """
    if (model.newline is not None) != had_newline:
        raise ValueError("--lora_rank trains W and adapters alone: an aspect in tiles goes with a "
                         "checkpoint that has learnt it, and only there")
    if had_newline:
        model.newline.requires_grad_(False)
    add_adapters(model.f_phi, rank, alpha=2 * rank, dropout=0.05)
