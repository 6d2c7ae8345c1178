"""
Gated blocks in a locked CLIP: REACT's modularised encoder (Diss. Fig. 2.3), and what trains in each row of Diss. Table 2.6.

    ... --> gated block --> CLIP's own layer --> ...         in each of a tower's last k layers

    y = x + tanh(alpha_attn)  MHA(LN(x))       Both alphas are scalars that start at 0: before it is trained, a gated tower
    z = y + tanh(alpha_dense) MLP(LN(y))       is CLIP, bit for bit.

A gated CLIP is a Hugging Face folder with one more key in vision_config or text_config: `gated_layers`, k. Only the classes
below build such blocks: transformers, vLLM and the like would leave the gated weights out, and run another model.
"""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from checkpoint import load_part


class GatedBlock(nn.Module):
    """Self-attention and MLP behind two tanh gates (Diss. Fig. 2.3): 12 D_v^2 + 13 D_v + 2 parameters."""

    def __init__(self, config):
        super().__init__()
        D_v = config.hidden_size
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(D_v, eps=config.layer_norm_eps) for _ in range(2))
        self.self_attn = CLIPAttention(config)           # as many heads as the tower
        # OFFICIAL: D_v -> 4 D_v -> D_v in every tower, also in bigG, whose own MLP is wider
        self.mlp = nn.Sequential(nn.Linear(D_v, 4 * D_v), ACT2FN[config.hidden_act], nn.Linear(4 * D_v, D_v))
        self.alpha_attn, self.alpha_dense = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, x, attention_mask=None, **more):
        """x (B, 1 + N, D_v), or (B, T, D) of the text tower, whose causal mask is in the other arguments."""
        y = x + self.alpha_attn.tanh() * self.self_attn(self.layer_norm1(x), attention_mask, **more)[0]      # (B, 1 + N, D_v)
        z = y + self.alpha_dense.tanh() * self.mlp(self.layer_norm2(y))      # (B, 1 + N, D_v)
        return z


class GatedLayer(CLIPEncoderLayer):
    """CLIP's layer with a gated block immediately before it."""

    def forward(self, x, attention_mask=None, **more):
        return super().forward(self.gated(x, attention_mask, **more), attention_mask, **more)


def gate(tower, k):
    """Put a gated block before each of the last k layers of a tower, in place; the tower's own weights stay as they are."""
    layers = tower.encoder.layers
    if not 0 < k <= len(layers):
        raise ValueError(f"gated_layers {k}: this tower has {len(layers)} layers, so 1 to {len(layers)} of them can be gated")
    for layer in layers[-k:]:
        layer.__class__ = GatedLayer                     # its own weights keep their places, and their names
        layer.gated = GatedBlock(tower.config).to(layer.layer_norm1.weight)
    tower.config.gated_layers = k


def gate_as_configured(*towers):
    for tower in towers:
        if k := getattr(tower.config, "gated_layers", 0):
            gate(tower, k)


class VisionTower(CLIPVisionModel):
    """LLaVA's g: CLIP's image tower, with the gated blocks that its config tells of, if any."""
    base_model_prefix = "vision_model"                   # in the files of a whole CLIP

    def __init__(self, config):
        super().__init__(config)
        gate_as_configured(self)


class GatedCLIP(CLIPModel):
    """CLIP with the gated blocks that its config tells of, if any; its outputs are u, v and tau of Diss. Eqs. 2.4-2.6."""

    def __init__(self, config):
        super().__init__(config)
        gate_as_configured(self.vision_model, self.text_model)

    def images(self, X):
        """u (B, D), of length 1, of pictures X (B, 3, H, W)."""
        return F.normalize(self.get_image_features(X).pooler_output.float(), dim=-1)

    def texts(self, input_ids):
        """v (B, D), of length 1, of texts (B, T) from `tokenise`."""
        return F.normalize(self.get_text_features(input_ids).pooler_output.float(), dim=-1)

    def forward(self, X, input_ids):
        return self.images(X), self.texts(input_ids), self.logit_scale.exp()


def load_clip(name, dtype=torch.float32):
    """(CLIP, its tokenizer) from a hub id or a folder, gated or not."""
    return load_part(GatedCLIP, name, "clip", dtype).eval(), AutoTokenizer.from_pretrained(name)


def tokenise(texts, tokenizer, config):
    """Texts as CLIP reads them, cut at its context: ids (B, T), each row from the beginning's id to the end's, of which it may
    have more.

    OURS: CLIP pools at the id in its config; an old 2 there stands for the largest of all, which is the tokenizer's end.
    """
    end = tokenizer.eos_token_id if config.eos_token_id == 2 else config.eos_token_id
    words = tokenizer(list(texts), add_special_tokens=False, truncation=True,
                      max_length=config.max_position_embeddings - 2).input_ids
    T = 2 + max(map(len, words))
    return torch.tensor([[tokenizer.bos_token_id, *ids, *[end] * (T - 1 - len(ids))] for ids in words])      # (B, T)


# Diss. Table 2.6, with the trained parameters of ViT-B/32 and 6 gated layers: which towers are gated, and what trains besides
# logit_scale, by name. OFFICIAL: locked_text there locks text_projection, too (87.8M); the table's 88.1M has it.
ROWS = {
    "locked_text_gated_image": (["vision_model"], r"\.gated\."),                     # 42.5M: REACT
    "locked_text": ([], r"vision_model|visual_projection|text_projection"),          # 88.1M
    "locked_image": ([], r"text_model|text_projection"),                             # 63.4M
    "gated_text": (["text_model"], r"\.gated\."),                                    # 18.9M
    "full": ([], r""),                                                               # 151.3M
    # OURS: the gated blocks of both towers, 61.4M. The table says 89.8M and not of what; these blocks and all that lies outside
    # of both towers' layers would be as many. The row is not settled.
    "gated_both": (["vision_model", "text_model"], r"\.gated\."),
}


def customise(clip, row, k=6):
    """Prepare a CLIP for a row of Diss. Table 2.6, in place: gated and frozen. Returns theta, as {name: parameter}.

    OFFICIAL: gated are the last 6 layers of B/32, B/16 and L/14, the last 12 of bigG/14; logit_scale trains in every row.
    """
    towers, trained = ROWS[row]
    for tower in towers:
        gate(getattr(clip, tower), k)
    for name, p in clip.named_parameters():
        p.requires_grad_(name == "logit_scale" or bool(re.search(trained, name)))
    return {name: p for name, p in clip.named_parameters() if p.requires_grad}
