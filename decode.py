"""
f_phi as it answers: some tokens at a time, behind a cache of keys and values.

    prompt --extend--> logits of the next word --extend--> ...           cache.kv grows in place

`Plain` is any language model of transformers with transformers' own cache. `Fast` is the Llama family (Llama, Mistral, Qwen2)
written out: what several projections make of one input is one matrix product, and keys and values have their place from the
start, so that a second question about a picture finds the first one's there. On x86 CPUs, weights are packed for oneDNN, whose
products of a few rows are up to twice as fast as those that torch takes.

Dimension letters:  B rows   n new tokens   D model width   H query heads   G heads of keys and values   d width of a head
"""
import platform
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache

FAMILY = ("llama", "mistral", "qwen2")                   # `model_type`s whose layers are what Fast.blocks writes out
PACKED = 2 ** 18                                         # of smaller weights, oneDNN's products take longer than torch's
MOST = 2 ** 31                                           # weights of a model that is packed: it is a copy
ROOM = 256                                               # a cache's length is a multiple of it: a compiled step is used again


class Plain:
    """Any language model, by transformers' own modules."""
    reuses = False                                       # whether a cache can be cut back and gone on with

    def __init__(self, f_phi):
        self.f_phi = f_phi

    def cache(self, B, room):
        return SimpleNamespace(past=DynamicCache(config=self.f_phi.config))

    def extend(self, cache, H, position, mask):
        """Append H (B, n, D) at `position` (B, n), where mask (B, all so far), or None, says what is no padding. Returns the
        logits (B, V) behind the last."""
        return self.f_phi(inputs_embeds=H, attention_mask=mask, position_ids=position, past_key_values=cache.past,
                          use_cache=True, logits_to_keep=1).logits[:, -1]

    def keep(self, cache, rows):
        """Go on with these rows alone."""
        cache.past.batch_select_indices(rows)


class Fast:
    """The Llama family, for answers only: weights are read once, so train or load first. `compiled`: each step, but for the
    prompt's, is one compiled program with static shapes (CUDA graphs on GPUs), which takes a minute to start."""
    reuses = True

    def __init__(self, f_phi, compiled=False):
        config, base = f_phi.config, f_phi.base_model
        self.H, self.G, self.d = config.num_attention_heads, config.num_key_value_heads, base.layers[0].self_attn.head_dim
        self.rope, self.eps, self.norm = base.rotary_emb, config.rms_norm_eps, base.norm.weight
        self.compiled = compiled
        weight, x86 = self.norm, torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
        pack = x86 and not compiled and weight.dtype == torch.float32 and weight.device.type == "cpu" and (
            sum(p.numel() for p in f_phi.parameters()) < MOST)
        self.head = together(pack, f_phi.get_output_embeddings())
        self.layers = [SimpleNamespace(
            norm_1=layer.input_layernorm.weight, norm_2=layer.post_attention_layernorm.weight,
            qkv=together(pack, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            o=together(pack, layer.self_attn.o_proj), down=together(pack, layer.mlp.down_proj),
            gate_up=together(pack, layer.mlp.gate_proj, layer.mlp.up_proj)) for layer in base.layers]
        self.step = torch.compile(self.blocks, dynamic=False, mode="reduce-overhead") if compiled else self.blocks

    def cache(self, B, room):
        """`kv`: (K, V) of each layer, (B, G, room, d), of which the first `length` places are taken."""
        shape = B, self.G, -(-room // ROOM) * ROOM, self.d
        kv = [(self.norm.new_zeros(shape), self.norm.new_zeros(shape)) for _ in self.layers]
        if self.compiled:                                # else CUDA graphs would copy it at each step
            for x in sum(kv, ()):
                torch._dynamo.mark_static_address(x)
        return SimpleNamespace(length=0, kv=kv)

    def extend(self, cache, H, position, mask):
        """As `Plain.extend`."""
        n, at, end = H.shape[1], cache.length, cache.length + H.shape[1]
        room = cache.kv[0][0].shape[2]
        if end > room:                                   # of a conversation that goes on
            cache.kv = [tuple(F.pad(x, (0, 0, 0, -(-end // ROOM) * ROOM - room)) for x in one) for one in cache.kv]
        static = self.compiled and n == 1
        window = cache.kv[0][0].shape[2] if static else end
        slots = torch.arange(at, end, device=H.device)   # (n,)
        sees = None
        if static or mask is not None or (at and n > 1): # else: all, or, in a whole prompt, what stands before
            sees = torch.arange(window, device=H.device) <= slots[:, None]                   # (n, window)
            if mask is not None:
                sees = sees & F.pad(mask, (0, window - end)).bool()[:, None]                 # (B, n, window)
            sees = sees.expand(len(H), n, window)[:, None]                   # (B, 1, n, window)
        step = self.step if static else self.blocks
        cos, sin = (x[:, :, None] for x in self.rope(H, position))           # (B, n, 1, d)
        sin = torch.cat([-sin[..., :self.d // 2], sin[..., self.d // 2:]], -1)               # for halves that change places
        h = step(H, cos, sin, cache.kv, slots, window, sees)                 # (B, D)
        cache.length = end
        return self.head(h)                              # (B, V)

    def blocks(self, h, cos, sin, kv, slots, window, sees):
        """All layers over h (B, n, D), whose keys and values go to `slots` of `kv`; `sees`: which of the first `window` places
        each query attends to, None: in a prompt those before it, behind one all. Returns the last token's h (B, D)."""
        (B, n, D), H, G, d = h.shape, self.H, self.G, self.d
        norm = lambda x, weight: F.rms_norm(x, (D,), weight, self.eps)
        for layer, (K, V) in zip(self.layers, kv):
            qk, v = layer.qkv(norm(h, layer.norm_1)).view(B, n, H + 2 * G, d).split([H + G, G], 2)
            q, k = torch.addcmul(qk * cos, qk.roll(d // 2, -1), sin).split([H, G], 2)        # (B, n, H, d), (B, n, G, d)
            K.index_copy_(2, slots, k.transpose(1, 2))   # (B, G, room, d)
            V.index_copy_(2, slots, v.transpose(1, 2))
            y = F.scaled_dot_product_attention(q.transpose(1, 2), K[:, :, :window], V[:, :, :window], attn_mask=sees,
                                               is_causal=sees is None and n > 1, enable_gqa=H != G)      # (B, H, n, d)
            h = h + layer.o(y.transpose(1, 2).reshape(B, n, H * d))
            gate, up = layer.gate_up(norm(h, layer.norm_2)).chunk(2, -1)
            h = h + layer.down(F.silu(gate) * up)
        return norm(h[:, -1], self.norm)

    def keep(self, cache, rows):
        cache.kv = [(K[rows], V[rows]) for K, V in cache.kv]


class Past:
    """What the answer of one row left, for the next turn: the ids that are in the cache, and which pictures are among them."""

    def __init__(self):
        self.ids, self.pictures, self.cache = [], [], None

    def common(self, ids, pictures, counts, image_id):
        """How many of a prompt's first tokens, and pictures, it has, too. `counts`: the tokens of each picture. The last token
        is never among them, as the next word is seen from there; no picture is cut."""
        n = next((k for k, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        n, k, at = min(n, len(ids) - 1), 0, 0
        for one, other, count in zip(self.pictures, pictures, counts):
            start = ids.index(image_id, at)
            if one != other or start + count > n:
                return min(n, start), k
            k, at = k + 1, start + count
        return (min(n, ids.index(image_id, at)) if image_id in ids[at:] else n), k

    def cut(self, n, pictures):
        """Keep the first n tokens."""
        self.ids, self.pictures = self.ids[:n], pictures
        if self.cache:
            self.cache.length = n


def together(pack, *linears):
    """One function for what several nn.Linear make of the same input, side by side. Weights that are quantised, or behind
    adapters, stay as they are; others are laid together, and their layers look into that, or, packed, keep theirs."""
    if not all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in linears):
        return lambda x: torch.cat([m(x) for m in linears], -1)
    weight, bias = linears[0].weight.data, linears[0].bias
    if len(linears) > 1:
        weight = torch.cat([m.weight.data for m in linears])
        bias = None if bias is None else torch.cat([m.bias.data for m in linears])
    if pack and weight.numel() >= PACKED:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)        # laid out for 8 rows: as good for one
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    for m, part in zip(linears, weight.split([m.out_features for m in linears])):
        m.weight.data = part
    return lambda x: F.linear(x, weight, bias)


def decoder_of(f_phi, compiled=False):
    """`Fast` where it knows the model, else `Plain`. Not while f_phi is trained: Fast may keep copies of its weights."""
    config = f_phi.config
    windows = getattr(config, "sliding_window", None) or {*(getattr(config, "layer_types", None) or [])} - {"full_attention"}
    known = config.model_type in FAMILY and config.hidden_act == "silu" and not windows
    if compiled and not known:
        raise ValueError(f"--compile: a language model of type {config.model_type} is not one of {', '.join(FAMILY)} with "
                         "full attention; leave it out")
    return Fast(f_phi, compiled) if known else Plain(f_phi)


def quantise(f_phi):
    """The weights of f_phi's layers and head in 8 bits, one scale a row, in place; products stay in its own precision."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(f"--int8 needs torchao: pip install torchao ({error})") from error
    quantize_(f_phi, Int8WeightOnlyConfig())
