"""
Gated blocks in a locked CLIP: REACT's modularised encoder (Diss. Fig. 2.3).

    ... --> gated block --> CLIP's own layer --> ...         in each of a tower's last k layers

    y = x + tanh(alpha_attn)  MHA(LN(x))       Both alphas are scalars that start at 0: before it is
    z = y + tanh(alpha_dense) MLP(LN(y))       trained, a gated tower is CLIP, bit for bit.

A gated CLIP is a Hugging Face folder with one more key in vision_config or text_config:
`gated_layers`, k. Only GatedCLIP and the CLIPTower of parts/towers.py build such blocks:
transformers, vLLM and the like would leave the gated weights out, and run another model.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import CLIPModel
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer


class GatedBlock(nn.Module):
    """Self-attention and MLP behind two tanh gates (Diss. Fig. 2.3).

    It has 12 D_v^2 + 13 D_v + 2 parameters.
    """

    def __init__(self, config):
        super().__init__()
        D_v = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(D_v, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)           # as many heads as the tower
        self.alpha_attn = nn.Parameter(torch.zeros(()))
        self.layer_norm2 = nn.LayerNorm(D_v, eps=config.layer_norm_eps)
        # OFFICIAL: D_v -> 4 D_v -> D_v in every tower, also in bigG, whose own MLP is wider
        self.mlp = nn.Sequential(
            nn.Linear(D_v, 4 * D_v),
            ACT2FN[config.hidden_act],
            nn.Linear(4 * D_v, D_v),
        )
        self.alpha_dense = nn.Parameter(torch.zeros(()))

    def forward(self, x, attention_mask=None, **more):
        """x (B, 1 + N, D_v), or (B, T, D) of the text tower, whose causal mask is in `more`."""
        attended, _ = self.self_attn(self.layer_norm1(x), attention_mask, **more)
        y = x + self.alpha_attn.tanh() * attended                        # (B, 1 + N, D_v)
        z = y + self.alpha_dense.tanh() * self.mlp(self.layer_norm2(y))  # (B, 1 + N, D_v)
        return z


class GatedLayer(CLIPEncoderLayer):
    """CLIP's layer with a gated block immediately before it."""

    def forward(self, x, attention_mask=None, **more):
        x = self.gated(x, attention_mask, **more)
        return super().forward(x, attention_mask, **more)


def gate(tower, k):
    """Put a gated block before each of the last k layers of a tower, in place.

    The tower's own weights stay as they are and keep their names. ValueError for more than it has.
    """
    layers = tower.encoder.layers
    n = len(layers)
    if not 0 < k <= n:
        raise ValueError(f"gated_layers {k}: this tower has {n} layers; gate 1 to {n} of them")
    for layer in layers[-k:]:
        layer.__class__ = GatedLayer
        layer.gated = GatedBlock(tower.config).to(layer.layer_norm1.weight)
    tower.config.gated_layers = k


def gate_as_configured(tower):
    """Gate what the tower's config says was gated when it was saved."""
    k = getattr(tower.config, "gated_layers", 0)
    if k:
        gate(tower, k)


class GatedCLIP(CLIPModel):
    """CLIP with the gated blocks of its config; its outputs are u, v, tau of Diss. Eqs. 2.4-2.6."""

    def __init__(self, config):
        super().__init__(config)
        gate_as_configured(self.vision_model)
        gate_as_configured(self.text_model)

    def images(self, X_v):
        """u (B, D), of length 1, of pictures X_v (B, 3, H, W)."""
        u = self.get_image_features(X_v).pooler_output
        return F.normalize(u.float(), dim=-1)

    def texts(self, input_ids):
        """v (B, D), of length 1, of texts (B, T)."""
        v = self.get_text_features(input_ids).pooler_output
        return F.normalize(v.float(), dim=-1)

    def forward(self, X_v, input_ids):
        return self.images(X_v), self.texts(input_ids), self.logit_scale.exp()
