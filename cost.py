"""
What a training step costs, in FLOPs and in memory, part by part, before it is run (train.py --dry_run, bench.py).

    weights, gradients, moments   of what trains 4 bytes a number, and two moments; of frozen weights 2 bytes in bf16
    activations                   what autograd keeps of the forward pass, counted tensor by tensor in a run without data and
                                  arithmetic (torch's FakeTensorMode), which takes seconds for 34B parameters
    logits                        of the answer tokens, at most CHUNK at a time, with their gradients

The sum is an upper bound: gradients are all counted while activations still are. What else a process needs (Python and its
libraries, kernels, pieces of freed memory) is not in it.
"""
from collections import Counter
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gated import VisionTower
from lora import add_adapters
from model import CHUNK, LLaVA


UNMASKED = "sdpa_unmasked"           # without data transformers always makes a mask; a run, padded on the right, has none
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


class Longest(NamedTuple):
    """The sample that needs most."""
    T: int                 # tokens, pictures included
    answers: int           # scored tokens
    sizes: list            # of its pictures, (width, height)


class Setting(NamedTuple):
    """What is trained, and where. The first four make the model; `config` is train.py's."""
    vision_config: object
    text_config: object
    tokenizer: object
    view: object
    config: object
    dtype: torch.dtype
    ranks: int = 1

    def model(self):
        """The model that train.py would train, to be made and used under FakeTensorMode: its weights need no memory. Shards
        compute with copies in `dtype`; without them, what trains stays in fp32."""
        config = self.config
        f_phi = AutoModelForCausalLM.from_config(self.text_config, attn_implementation=UNMASKED)
        g = VisionTower(self.vision_config)
        model = LLaVA(g, f_phi, self.tokenizer, config.feature_layer, projector=config.projector)
        model.look(self.view)
        model.set_stage(config.stage, train_g=config.lr_g is not None)
        if config.lora_rank:
            add_adapters(model.f_phi, config.lora_rank, config.lora_alpha)
        for p in model.parameters():
            p.data = p.data.to(self.dtype if config.shard or not p.requires_grad else torch.float32)
        return model


def kept(model, B, longest, dtype):
    """{part: bytes} that autograd keeps of a forward pass over B samples. The parts: "g, W", each decoder layer's number,
    "head" for one answer, and "input" of a layer. Of the weights, only the copies that autocast makes."""
    seen, place, own = {}, ["g, W"], {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(t):
        if (key := t.untyped_storage()._cdata) not in own:
            seen.setdefault(key, (t.untyped_storage(), place[0]))
        return t

    def enter(i):
        def hook(*_):
            place[0] = i
        return hook

    sizes, side = longest.sizes * B, model.view.size
    squares = sum(model.view.n_squares(*size) for size in sizes)
    handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(model.f_phi.base_model.layers)]
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        H_v = model.encode_images(torch.empty(squares, 3, side, side, dtype=next(model.g.parameters()).dtype), sizes)
        table = model.f_phi.get_input_embeddings().weight
        H = torch.empty(B, longest.T, table.shape[1], dtype=table.dtype, requires_grad=True) + 0 * H_v.sum()
        h = model.f_phi.base_model(inputs_embeds=H, use_cache=False).last_hidden_state
        place[0] = "head"
        nll = model.answer_nll(h[0, :1], torch.zeros(1, dtype=torch.long))   # alive, as all that is kept for it
    for handle in handles:
        handle.remove()
    parts = Counter({"input": H.numel() * H.element_size()})
    for storage, part in seen.values():
        parts[part] += storage.nbytes()
    del nll
    return parts


def estimate(setting, longest):
    """A function (micro_batch_size, every) -> {part: bytes} of a step on one rank, `every` as in sharding.recompute. What is
    kept is counted for one sample and for two; what does not grow are the weights' copies."""
    config, dtype, width = setting.config, setting.dtype, torch.finfo(setting.dtype).bits // 8
    with FakeTensorMode():
        model = setting.model()
        one, two = (kept(model, B, longest, dtype) for B in (1, 2))
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        whole_g = 0 if model.train_g else sum(p.numel() for p in model.g.parameters())
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) - whole_g
        decoder, words = model.f_phi.base_model.layers, model.f_phi.config.vocab_size
        layers, layer = len(decoder), sum(p.numel() for p in decoder[0].parameters())
        gathered = sum(p.numel() for p in model.f_phi.parameters()) - (layers - 2) * layer   # two layers at a time
    grows = Counter({part: two[part] - one[part] for part in two})
    copies = sum(one[part] - grows[part] for part in one if part != "input")
    share = setting.ranks if config.shard else 1

    def parts(micro_batch_size, every):
        again = range(0, layers, every) if every else ()
        found = {"weights": (4 * trains + width * frozen) / share + width * whole_g,
                 "their copies": width * gathered if config.shard else copies,
                 "gradients": 4 * trains / share, "AdamW's moments": 8 * trains / share}
        found["activations"] = micro_batch_size * (
            grows["g, W"] + sum(grows[i] for i in range(layers) if i not in again) + len(again) * grows["input"]
            + (grows[layers - 1] if layers - 1 in again else 0))             # the first that runs again, while all are kept
        found["logits"] = 2 * (4 + width) * min(micro_batch_size * longest.answers * words, CHUNK)     # softmax, gradients
        return found
    return parts


def flops_of(model, lengths, answers, visual_tokens, squares):
    """FLOPs of a step over samples of those lengths: 2 a weight and token in the forward pass, as many for the gradient of what
    goes in, and as many for its own where it trains. Attention: two matrix products over the pairs that a causal mask leaves,
    and twice that backwards. The head sees answers alone, W visual tokens. g, of which the layers before Z_v run, goes forward
    alone, and nothing goes back to it, unless it trains."""
    def weights(*modules, passes=None):
        return sum(p.numel() * (passes or 2 + p.requires_grad) for m in modules for p in m.parameters() if p.dim() == 2)

    text, used, n, passes_g = model.f_phi.config, model.g.encoder.layers[:model.used_layers], model.N + 1, 1 + 2 * model.train_g
    pairs = sum(length ** 2 for length in lengths) / 2
    body = 2 * weights(*model.f_phi.base_model.layers) * sum(lengths)
    attention = 3 * 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * pairs
    head = 2 * weights(model.f_phi.get_output_embeddings()) * answers
    first, *more = (m for m in model.W.modules() if isinstance(m, torch.nn.Linear))
    W = 2 * (weights(first, passes=2 + model.train_g) + weights(*more, passes=3)) * visual_tokens
    g = squares * passes_g * (2 * n * weights(*used, passes=1) + 4 * n ** 2 * model.g.config.hidden_size * len(used))
    return body + attention + head + W + g


WAYS = {"none": 0, "every_2": 2, "all": 1}               # of --checkpoint_activations, from the fastest to the smallest


def fitting(need, share, has):
    """[(way, micro-batch), ...] that fit into `has` bytes with a tenth left free, of the micro-batches that divide a rank's
    `share` of the global batch; the best first: the least to run again, then the most at once."""
    return [(way, micro) for way, every in WAYS.items() for micro in range(share, 0, -1)
            if share % micro == 0 and sum(need(micro, every).values()) <= 0.9 * has]


def plan(need, share, has):
    """Lines: what micro-batches need, which fit (`fitting`), and which to take."""
    lines, fits = [f"what fits into {has / 1e9:.1f} GB, a tenth left free (*), in GB", f"  --micro_batch_size{'':>4}"
                   + "".join(f"{way:>10}" for way in WAYS) + "   --checkpoint_activations"], fitting(need, share, has)
    for micro in (m for m in range(share, 0, -1) if share % m == 0):
        sums = {way: sum(need(micro, every).values()) for way, every in WAYS.items()}
        lines.append(f"  {micro:<22}" + "".join(f"{n / 1e9:>9.1f}{' *'[(way, micro) in fits]}" for way, n in sums.items()))
    return [*lines, "take --micro_batch_size {1} --checkpoint_activations {0}".format(*fits[0]) if fits else
            "nothing fits: --shard over more devices, --offload, or adapters (--lora_rank)"]
