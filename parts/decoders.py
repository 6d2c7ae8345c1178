"""
f_phi as it answers: some tokens at a time, behind a cache of keys and values (for parts/engine.py).

    prompt --extend--> logits of the next word --extend--> ...         the cache grows in place

`Plain` is any language model of transformers with transformers' own cache. `Fast` is the Llama
family (Llama, Mistral, Qwen2 and 3, SmolLM3) written out: projections of one input are a single
product, and keys and values have their place from the start, where a second question about a
picture finds them. On x86 processors weights are packed for oneDNN, whose products of a few rows
take down to half the time of torch's.

Letters in shape comments:
    B rows   n new tokens   D width of f_phi   V vocabulary   H query heads
    G heads of keys and values   d width of a head
"""
import itertools
import math
import platform
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache

from parts.files import library

# each `model_type` whose layers `Fast` writes out
FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
MIN_PACKED = 2 ** 18     # weights of a product; oneDNN takes longer than torch for smaller ones
MAX_PACKED = 2 ** 31     # weights of a model; packing is a copy, which a larger one cannot afford
ROOM = 256               # a cache's length is a multiple of it


class Plain:
    """Any language model, by transformers' own modules."""
    reuses = False       # whether a cache can be cut back, to go on from there
    shrinks = True       # whether rows that have ended leave, by `select`

    def __init__(self, f_phi):
        self.f_phi = f_phi

    def cache(self, B, room):
        return SimpleNamespace(length=0, past=DynamicCache(config=self.f_phi.config))

    def extend(self, cache, H, position, mask):
        """Append H (B, n, D) to a cache; returns the logits (B, V) behind the last of them.

        position (B, n); mask (B, all so far) is 0 at padding, or None where there is none.
        """
        out = self.f_phi(inputs_embeds=H, attention_mask=mask, position_ids=position,
                         past_key_values=cache.past, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def select(self, cache, rows):
        """Go on with these rows alone."""
        cache.past.batch_select_indices(rows)


class Fast:
    """The Llama family, for answers alone: it reads the weights once, so train or load first."""
    reuses = True
    shrinks = True
    step = None          # of one token: `blocks`, compiled

    def __init__(self, f_phi, packed=False):
        config = f_phi.config
        base = f_phi.base_model
        self.H = config.num_attention_heads
        self.G = config.num_key_value_heads
        self.d = base.layers[0].self_attn.head_dim
        self.rotary = base.rotary_emb
        self.eps = config.rms_norm_eps
        self.last_norm = base.norm.weight
        self.head = Product([f_phi.get_output_embeddings()], packed)
        self.layers = [layer_of(layer, packed) for layer in base.layers]

    def cache(self, B, room):
        """kv: (keys, values) of each layer, (B, G, room, d); `length` of their places are taken."""
        return SimpleNamespace(length=0, kv=self.places(B, round_up(room)))

    def places(self, B, room):
        shape = (B, self.G, room, self.d)
        return [tuple(self.last_norm.new_zeros(2, *shape)) for _ in self.layers]

    def grow(self, cache, room):
        """Give a conversation more room than its first answer asked for."""
        old = list(itertools.chain(*cache.kv))
        cache.kv = self.places(len(old[0]), room)
        for x, new in zip(old, itertools.chain(*cache.kv), strict=True):
            new[:, :, :x.shape[2]] = x

    def extend(self, cache, H, position, mask):
        """As `Plain.extend`."""
        n = H.shape[1]
        start = cache.length
        end = start + n
        if end > cache.kv[0][0].shape[2]:
            self.grow(cache, round_up(end))
        static = self.step and n == 1
        window = cache.kv[0][0].shape[2] if static else end
        slots = torch.arange(start, end, device=H.device)                    # (n,)
        # None lets attention take a faster way: one token sees all, a whole prompt what is before
        sees = None
        if static or mask is not None or (start > 0 and n > 1):
            sees = torch.arange(window, device=H.device) <= slots[:, None]   # (n, window)
            if mask is not None:
                padded = F.pad(mask, (0, window - mask.shape[1]))            # (B, window)
                sees = sees & padded.bool()[:, None]                         # (B, n, window)
            sees = sees.expand(len(H), n, window)[:, None]
        cos, sin = self.rotary(H, position)                                  # (B, n, d)
        sin[..., :self.d // 2].neg_()    # of halves that change places, one changes its sign
        step = self.step if static else self.blocks
        h = step(H, cos[:, :, None], sin[:, :, None], cache.kv, slots, window, sees)     # (B, D)
        cache.length = end
        return self.head(h)                                                  # (B, V)

    def blocks(self, h, cos, sin, kv, slots, window, sees):
        """All layers over h (B, n, D). Returns the last token's h (B, D).

        Keys and values go to `slots` of kv. `sees` (B, 1, n, window) says which of the first
        `window` places each token attends to; None: in a prompt those before it, else all.
        """
        B, n, _ = h.shape
        for layer, (keys, values) in zip(self.layers, kv, strict=True):
            qkv = layer.qkv(self.norm(h, layer.norm_1))  # (B, n, (H + 2 G) d)
            qk, v = qkv.view(B, n, -1, self.d).split([self.H + self.G, self.G], 2)
            if layer.norm_qk is not None:                # Qwen3's, of each head
                qk = self.norm(qk, None) * layer.norm_qk
            if layer.has_rotary:                         # each but every fourth of SmolLM3
                qk = torch.addcmul(qk * cos, qk.roll(self.d // 2, -1), sin)
            q, k = qk.split([self.H, self.G], 2)         # (B, n, H, d), (B, n, G, d)
            keys.index_copy_(2, slots, k.transpose(1, 2))
            values.index_copy_(2, slots, v.transpose(1, 2))
            y = self.attend(q, keys[:, :, :window], values[:, :, :window], sees)
            h = h + layer.o(y)                           # (B, n, D)
            gate, up = layer.gate_up(self.norm(h, layer.norm_2)).chunk(2, -1)
            h = h + layer.down(F.silu(gate) * up)
        return self.norm(h[:, -1], self.last_norm)

    def attend(self, q, k, v, sees):
        """Attention of q (B, n, H, d) to k and v (B, G, window, d): (B, n, H d)."""
        B, n, _, d = q.shape
        if n == 1:                       # the queries that share a head are as if its tokens
            y = F.scaled_dot_product_attention(q.view(B, self.G, -1, d), k, v, attn_mask=sees)
            return y.reshape(B, 1, -1)
        if sees is not None and k.is_cuda:
            # no fused kernel has grouped queries and a mask, and another holds (B, H, n, window)
            k = k.repeat_interleave(self.H // self.G, 1)
            v = v.repeat_interleave(self.H // self.G, 1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=sees,
                                           is_causal=sees is None,
                                           enable_gqa=k.shape[1] != self.H)      # (B, H, n, d)
        return y.transpose(1, 2).flatten(2)

    def norm(self, h, weight):
        return F.rms_norm(h, h.shape[-1:], weight, self.eps)

    def select(self, cache, rows):
        cache.kv = [(keys[rows], values[rows]) for keys, values in cache.kv]


class Compiled(Fast):
    """`Fast`, whose steps behind the prompt are one program of static shapes, a CUDA graph on GPUs.
    It takes about a minute to start.

    A graph reads and writes where it did when it was recorded. So there is one cache: who asks for
    it takes it from the conversation before, whose length is 0 from then on, and rows that have
    ended stay. Another number of rows, or twice the room, is compiled anew.
    """
    shrinks = False

    def __init__(self, f_phi):
        super().__init__(f_phi)
        mark_static(self.last_norm)
        for layer in self.layers:
            for part in vars(layer).values():
                mark_static(*(part.tensors() if isinstance(part, Product) else [part]))
        self.step = torch.compile(self.blocks, dynamic=False, fullgraph=True,
                                  mode="reduce-overhead")
        self.last = SimpleNamespace(length=0, kv=[])

    def cache(self, B, room):
        kv = self.last.kv
        self.last.length = 0
        self.last.kv = []
        if kv and len(kv[0][0]) == B and kv[0][0].shape[2] >= room:
            for x in itertools.chain(*kv):
                x.zero_()                # a NaN would come through the mask
        else:
            kv = self.places(B, room)
        self.last = SimpleNamespace(length=0, kv=kv)
        return self.last

    def places(self, B, room):
        kv = super().places(B, ROOM * 2 ** math.ceil(math.log2(max(1, room / ROOM))))
        mark_static(*itertools.chain(*kv))
        return kv


def mark_static(*tensors):
    """CUDA graphs read these where they are; of others they make a copy at every step."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            torch._dynamo.mark_static_address(tensor, guard=False)


def layer_of(layer, packed):
    """A decoder layer of transformers: two norms, and four products for its seven nn.Linear."""
    attention = layer.self_attn
    mlp = layer.mlp
    norm_qk = None
    if hasattr(attention, "q_norm"):
        d = attention.head_dim
        heads = [(attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)]
        norm_qk = torch.cat([norm.weight.expand(linear.out_features // d, d)
                             for norm, linear in heads])
    return SimpleNamespace(
        norm_qk=norm_qk,                                 # (H + G, d)
        has_rotary=getattr(attention, "use_rope", True),
        norm_1=layer.input_layernorm.weight,
        norm_2=layer.post_attention_layernorm.weight,
        qkv=Product([attention.q_proj, attention.k_proj, attention.v_proj], packed),
        o=Product([attention.o_proj], packed),
        gate_up=Product([mlp.gate_proj, mlp.up_proj], packed),
        down=Product([mlp.down_proj], packed),
    )


class Product:
    """What several nn.Linear make of the same input, side by side, as one product.

    Weights that are quantised, or behind adapters, stay as they are. Others are laid together; then
    their layers look into that, so that nothing is held twice, or, if it is packed, keep theirs.
    """

    def __init__(self, linears, packed):
        self.linears = linears
        self.weight = None
        self.bias = None
        self.packed = False
        kinds = {(type(linear), type(linear.weight)) for linear in linears}
        if kinds != {(nn.Linear, nn.Parameter)}:
            return
        self.weight = torch.cat([linear.weight.data for linear in linears])
        if linears[0].bias is not None:
            self.bias = torch.cat([linear.bias.data for linear in linears])
        if packed and self.weight.numel() >= MIN_PACKED:
            self.packed = True           # laid out for products of 8 rows, and as good for one
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 8)
            return
        parts = self.weight.split([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.data = part

    def tensors(self):
        return [self.weight, self.bias]

    def __call__(self, x):
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.weight is None:
            return torch.cat([linear(x) for linear in self.linears], -1)
        return F.linear(x, self.weight, self.bias)


def can_be_packed(f_phi):
    """Whether oneDNN is at hand for these weights: fp32 on an x86 processor."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    kinds = {(p.device.type, p.dtype) for p in f_phi.parameters()}
    return kinds == {("cpu", torch.float32)} and f_phi.num_parameters() < MAX_PACKED


def round_up(length):
    return -(-length // ROOM) * ROOM


def decoder_for(f_phi, compiled=False):
    """`Fast` where it knows the model, else `Plain`."""
    config = f_phi.config
    layer_types = set(getattr(config, "layer_types", None) or [])
    windows = getattr(config, "sliding_window", None) or layer_types - {"full_attention"}
    if config.model_type in FAMILY and config.hidden_act == "silu" and not windows:
        return Compiled(f_phi) if compiled else Fast(f_phi, can_be_packed(f_phi))
    if compiled:
        raise ValueError(f"--compile: a language model of type {config.model_type} is not one of "
                         f"{', '.join(FAMILY)} with full attention; leave it out")
    return Plain(f_phi)


@torch.no_grad()
def check_language_model(f_phi):
    """Raises ValueError unless a language model fits: what trains, saves and shards it relies on
    the names of Llama's modules, and on logits that are the head's product and nothing else.

    It is tried rather than looked up, on two tokens and one layer: unknown kinds may fit, too.
    """
    kind = f_phi.config.model_type
    allowed = "; Llama, Mistral, Qwen2 and 3, SmolLM3, Gemma 3 (text alone), Phi-3 and 4 fit"
    base = getattr(f_phi, "model", None)
    head = f_phi.get_output_embeddings()
    is_plain = isinstance(head, nn.Linear) and head.bias is None
    if not (is_plain and hasattr(base, "layers") and hasattr(base, "embed_tokens")):
        raise ValueError(f"a language model of type {kind} lacks model.layers, model.embed_tokens "
                         f"or an lm_head without bias, which Llama has{allowed}")
    if getattr(f_phi.config, "use_bidirectional_attention", False):
        raise ValueError(f"{kind} with use_bidirectional_attention sees the words that it has to "
                         f"predict{allowed}")
    layers = base.layers
    base.layers = layers[:1]
    ids = torch.tensor([[0, 1]], device=head.weight.device)
    logits = f_phi(ids, use_cache=False).logits                              # (1, 2, V)
    H = base.embed_tokens(ids)                                               # (1, 2, D)
    h = base(inputs_embeds=H, use_cache=False).last_hidden_state
    base(inputs_embeds=H / 2, use_cache=False)           # Gemma 4 fails: a visual token is no word
    base.layers = layers
    if not torch.equal(logits, head(h)):
        raise ValueError(f"{kind} is not its word embeddings, layers and head alone: a soft cap, a "
                         "scale or embeddings of each layer are known neither in training nor in "
                         f"the llava-hf layout{allowed}")


def quantise(f_phi):
    """Hold f_phi's layers and head in 8 bits, with one scale a row; products stay as precise."""
    torchao = library("torchao.quantization", "int8", "torchao")
    torchao.quantize_(f_phi, torchao.Int8WeightOnlyConfig())
