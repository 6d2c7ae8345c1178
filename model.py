"""
The model of *Visual Instruction Tuning* (Liu, Li, Wu, Lee; arXiv 2304.08485v2), Sec. 4.1:

    X_v --g--> Z_v --W--> H_v --,
                                 >-- f_phi --> X_a          Fig. 1
    X_q -----embedding---> H_q -'

g is a CLIP ViT, always frozen; W is one linear layer; f_phi is a language model. An image is N
placeholder ids in `input_ids`; their embeddings are replaced by H_v, and nothing else is new.
Later members of the family change three things: W gets a second layer (LLaVA-1.5), a picture may be
looked at in tiles (`self.view`; images.py, tiles.py), and g may train, too (LLaVA-NeXT).

Dimension letters:  B samples   K images in the batch   N visual tokens per image   T sequence
                    D_v vision width   D model width   V vocabulary   A answer tokens in the batch
"""
import functools
import json
import os
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlavaConfig, LlavaNextConfig
from transformers.initialization import no_init_weights

import lora
import tiles
from checkpoint import PREFIX, PROJECTORS, hf_keys, load_part, load_settings, load_tokenizer, save_settings
from decode import Past, Plain
from gated import VisionTower
from images import view_of
from records import IMAGE

IGNORE = -100        # label of a position that is not scored; cross_entropy's own convention
CHUNK = 2 ** 24      # logits in memory at once: those of 523 answer tokens at 32,064 words, 67 MB in fp32


class LLaVA(nn.Module):
    """f_phi over [H_v, H_q], with H_v = W g(X_v) (Sec. 4.1, Fig. 1).

    g            CLIPVisionModel, maybe with gated blocks (gated.py)
    f_phi        any AutoModelForCausalLM whose logits are a plain linear head over its hidden states
                 (tested: Llama, Mistral, Qwen2; tied and untied heads)
    tokenizer    f_phi's tokenizer; it must know `<image>` (see `from_parts`)
    feature_layer  which hidden state of g is Z_v: -2 "before the last layer", or -1 (Table 8)
    meta         what we add to the checkpoint: template, stage, recipe, provenance (a flat dict)
    projector    "linear", or "mlp2x_gelu": two layers (Diss. Sec. 4.3)
    """

    def __init__(self, g, f_phi, tokenizer, feature_layer=-2, meta=None, projector="linear"):
        super().__init__()
        self.g, self.f_phi, self.tokenizer = g, f_phi, tokenizer
        self.feature_layer, self.meta, self.projector = feature_layer, dict(meta or {}), projector
        self.decoder = None                              # of answers, where it is not to be transformers' own: decode.py
        D_v, D = g.config.hidden_size, f_phi.config.hidden_size
        if projector == "linear":
            self.W = nn.Linear(D_v, D)                   # OFFICIAL: with a bias; Eq. (1) has none
        else:
            self.W = nn.Sequential(nn.Linear(D_v, D), nn.GELU(), nn.Linear(D, D))            # Diss. Sec. 4.3
        self.register_parameter("newline", None)         # a word that ends a row of tiles' features
        self.look(view_of("crop", g.config.image_size, g.config.patch_size))
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        assert self.image_id is not None and tokenizer.decode([self.image_id]) == IMAGE, f"the tokenizer has no {IMAGE}"
        self.set_stage(2)

    def look(self, view):
        """Look at pictures in another way (images.py). Tiles bring `newline`, a new word vector; back to squares, it goes."""
        self.view, self.meta["aspect"] = view, view.aspect
        self.meta.pop("tiling", None)
        if view.tiling:
            self.meta["tiling"] = json.loads(json.dumps(view.tiling._asdict()))              # lists, as they come back
        if bool(view.tiling) != (self.newline is not None):
            W, D = next(self.W.parameters()), self.f_phi.config.hidden_size
            self.newline = nn.Parameter(torch.randn(D, dtype=W.dtype, device=W.device) / D ** 0.5) if view.tiling else None

    @property
    def N(self):
        """Visual tokens of one square: 256 for ViT-L/14 at 224 px."""
        return self.view.N

    @property
    def used_layers(self):
        """How many layers of g there are before Z_v: with feature_layer -2 all but the last."""
        return len(self.g.encoder.layers) + self.feature_layer + 1

    @property
    def device(self):
        return next(self.W.parameters()).device

    # ------------------------------------------------------------------ what the paper says

    def grid_features(self, X_v):
        """Z_v = g(X_v): K squares of pixels to (K, N, D_v).  Sec. 4.1

        g is frozen, and keeps no graph, unless a recipe trains it (Diss. Sec. 4.7). K = 0 gives (0, N, D_v).
        """
        if len(X_v) == 0 and not self.train_g:
            return X_v.new_zeros(0, self.N, self.g.config.hidden_size)
        some = X_v if len(X_v) else X_v.new_zeros(1, *X_v.shape[1:])         # no rank waits for g's gradients: they are 0
        with torch.set_grad_enabled(self.train_g and torch.is_grad_enabled()):
            h = self.g.pre_layrnorm(self.g.embeddings(some))                 # (K, 1 + N, D_v)
            for layer in self.g.encoder.layers[:self.used_layers]:           # the layers behind Z_v would run for nothing
                h = layer(h, attention_mask=None)
        Z_v = h[:len(X_v), 1:]                           # (K, N, D_v)  grid features; CLS dropped
        return Z_v

    def encode_images(self, X_v, sizes=None):
        """H_v = W g(X_v), Eq. (1): K pictures to K x N tokens in the word embedding space.  Sec. 4.1

        X_v (K, 3, H, W) normalised pixels; K = 0 gives (0, N, D) that still carries W's graph, so that a
        batch of text alone leaves W a zero gradient and no rank of a distributed run waits for it.
        In tiles (Diss. Sec. 4.7) K counts squares; `sizes` are the pictures' (width, height), and H_v is (tokens, D).
        """
        Z_v = self.grid_features(X_v)                    # (K, N, D_v)
        H_v = self.W(Z_v.to(next(self.W.parameters()).dtype))                # (K, N, D)    Eq. (1)
        if self.view.tiling:
            plans = [self.view.tiling.plan(*size) for size in sizes]
            merged = tiles.merge(H_v, plans, self.newline, self.view.tiling)
            H_v = torch.cat([H_v[:0].flatten(0, 1), self.newline[None][:0].to(H_v.dtype), *merged])      # (tokens, D)
        return H_v

    def splice(self, input_ids, X_v, ids=None, sizes=None, shown=None):
        """Word embeddings with H_v in place of the placeholders.  Sec. 4.1

        input_ids (B, T), X_v (K, 3, H, W) in the order in which their placeholders stand, row by row; with `shown`, a list
        of indices into the pictures in that order, one that several rows show is given, and encoded, once.
        `ids`: the samples' names for the error message. Text-only rows, and rows with several images, mix.
        """
        is_image = input_ids == self.image_id            # (B, T)
        counts = [self.view.tokens(*size) for size in sizes] if self.view.tiling else [self.N] * len(X_v)
        order = range(len(counts)) if shown is None else shown
        found, have = is_image.sum(1).tolist(), [counts[i] for i in order]
        assert sum(found) == sum(have) and {0, *accumulate(have)} >= set(accumulate(found)), (
            f"{len(have)} pictures x {' or '.join(map(str, sorted(set(have))))} tokens = {sum(have)}, but the batch has "
            f"{sum(found)} {IMAGE} placeholders: " + ", ".join(f"{i}: {n}" for i, n in zip(ids or range(len(found)), found)))
        H_q = self.f_phi.get_input_embeddings()(input_ids)                   # (B, T, D)
        H_v = self.encode_images(X_v, sizes).flatten(0, -2)                  # (tokens, D)
        if shown:                                        # as often as each is shown
            pictures = H_v.split(counts)
            H_v = torch.cat([pictures[i] for i in shown])
        H = H_q.masked_scatter(is_image[..., None], H_v.to(H_q.dtype))       # (B, T, D)  H_v where placeholders stood
        return H

    def answer_states(self, input_ids, labels, X_v, ids=None, sizes=None, shown=None):
        """What predicts the answer tokens: f_phi's last hidden states h (A, D), before its head, and the tokens, targets (A,).

        input_ids, labels (B, T), padded on the RIGHT: causal attention never looks there, so no mask is needed.
        """
        H = self.splice(input_ids, X_v, ids, sizes, shown)                   # (B, T, D)
        h = self.f_phi.base_model(inputs_embeds=H, use_cache=False).last_hidden_state   # (B, T, D)
        scored = labels[:, 1:] != IGNORE                 # (B, T-1)  position t predicts token t+1
        h = h[:, :-1][scored]                            # (A, D)
        targets = labels[:, 1:][scored]                  # (A,)
        return h, targets

    def answer_nll(self, h, targets):
        """-log p of each answer token, (A,) float32. No (B, T, V) logits are built: only answers reach the vocabulary."""
        logits = self.f_phi.get_output_embeddings()(h)   # (A, V)
        return F.cross_entropy(logits.float(), targets, reduction="none")    # (A,)

    def forward(self, input_ids, labels, X_v, ids=None, sizes=None, shown=None):
        """-log p(X_a | X_v, X_instruct) = -sum_i log p_theta(x_i | X_v, X_instruct,<i, X_a,<i), Eq. (3).

        Returns (sum over the batch's A answer tokens, A). The caller divides by the answer tokens of the
        whole global batch: the loss then depends neither on accumulation nor on the number of ranks.
        OFFICIAL: the mean within each micro-batch, averaged; batches with few answer tokens weigh more there.
        """
        h, targets = self.answer_states(input_ids, labels, X_v, ids, sizes, shown)           # (A, D), (A,)
        n = max(1, CHUNK // self.f_phi.get_output_embeddings().out_features)
        one = self.answer_nll if len(targets) <= n else functools.partial(checkpoint, self.answer_nll, use_reentrant=False)
        nll = [one(*part) for part in zip(h.split(n), targets.split(n))]     # of many, the logits of a part at a time
        loss = torch.cat(nll).sum()                      # ()  Eq. (3)
        return loss, len(targets)

    @torch.inference_mode()
    def score(self, input_ids, labels, X_v, ids=None, sizes=None, shown=None):
        """log p(X_a | X_v, X_instruct) of each row's answer (the product of Eq. (3), not divided by its length).

        Takes what `forward` takes; returns (B,) float32. To rank answers, render each behind the same prompt.
        """
        log_p = -self.answer_nll(*self.answer_states(input_ids, labels, X_v, ids, sizes, shown))     # (A,)
        row = (labels[:, 1:] != IGNORE).nonzero()[:, 0]  # (A,)  which sample a token belongs to
        if len(row.unique()) < len(labels):
            raise ValueError("score: a row without an answer has no likelihood")
        return log_p.new_zeros(len(labels)).index_add_(0, row, log_p)        # (B,)

    def set_stage(self, stage, train_g=False):
        """Freeze by stage (Sec. 4.2): theta = {W} in stage 1, theta = {W, phi} in stage 2. g never trains.

        `train_g`: in stage 2 it does, up to the layer that is used (Diss. Sec. 4.7).
        Returns theta, as {name: parameter}.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage {stage!r}: the paper has stage 1 (theta = W) and stage 2 (theta = W, phi)")
        self.train_g = train_g and stage == 2
        self.g.requires_grad_(self.train_g)
        for unused in (*self.g.encoder.layers[self.used_layers:], self.g.post_layernorm):
            unused.requires_grad_(False)
        self.W.requires_grad_(True)
        self.f_phi.requires_grad_(stage == 2)
        if self.newline is not None:                     # OFFICIAL: it trains with the language model
            self.newline.requires_grad_(stage == 2)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------ generation

    @torch.no_grad()                                     # not inference_mode: a sharded model gathers its weights meanwhile
    def stream(self, input_ids, attention_mask, X_v, sizes=None, shown=None, max_new_tokens=512, temperature=0.0, top_p=1.0,
               stop=(), generator=None, past=None, watch=None):
        """Yield each step's next ids (a list of B, None where a row has ended), with a cache of keys and values (decode.py).

        input_ids, attention_mask (B, T), padded on the LEFT; X_v, sizes and `shown` as in `splice`. A row ends at an
        end-of-sequence id or once its new text holds one of the strings `stop`; the token that ends it is yielded. Once half
        of the rows have ended, the others go on without them. temperature 0 is greedy.
        past: of one row (`decode.Past`): the first tokens, which it has, are not computed again; X_v, sizes and `shown` are
        of the pictures behind them. `watch` is given each step's logits (rows that go on, V).
        """
        B, T = input_ids.shape
        limit = self.f_phi.config.max_position_embeddings
        if T >= limit:
            raise ValueError(f"the prompt is {T} tokens ({self.view.said}); the model's context is {limit}")
        decoder, room = self.decoder or Plain(self.f_phi), min(T + max_new_tokens, limit)
        past = past or Past()
        past.cache = past.cache or decoder.cache(B, room)
        n = len(past.ids)                                # tokens that are in the cache
        H = self.splice(input_ids[:, n:], X_v, sizes=sizes, shown=shown)     # (B, T - n, D)
        mask = None if attention_mask.all() else attention_mask              # (B, T)
        position = attention_mask.cumsum(1).sub(1).clamp(min=0)[:, n:]       # (B, T - n)  padding does not count
        window = 8 + max((len(s.encode()) for s in stop), default=0)         # ids that can hold a stop string
        rows, new, entering = list(range(B)), [[] for _ in range(B)], input_ids[0, n:].tolist()
        for _ in range(room - T):
            logits = decoder.extend(past.cache, H, position, mask).float()   # (rows, V)
            past.ids += entering
            logits[:, self.image_id:self.image_id + 1] = -torch.inf          # a placeholder is not a word
            if watch:
                watch(logits)
            next_id = sample_id(logits, temperature, top_p, generator)       # (rows,)
            step, live = [None] * B, []
            for k, (row, i) in enumerate(zip(rows, next_id.tolist())):
                if row is not None:
                    step[row] = i
                    new[row].append(i)
                    tail = self.tokenizer.decode(new[row][-window:])
                    if i in self.eos_ids or any(s in tail for s in stop):
                        rows[k] = None
                    else:
                        live.append(k)
            yield step
            if not live:
                return
            if len(live) <= len(rows) // 2:
                rows, live = [rows[k] for k in live], torch.tensor(live, device=H.device)
                decoder.keep(past.cache, live)
                next_id, position, mask = next_id[live], position[live], None if mask is None else mask[live]
            H = self.f_phi.get_input_embeddings()(next_id)[:, None]          # (rows, 1, D)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
            position, entering = position[:, -1:] + 1, next_id[:1].tolist()

    def generate(self, input_ids, attention_mask, X_v, sizes=None, shown=None, stop=(), **sampling):
        """Answers X_a as B strings, each cut before its stop string and stripped. Arguments as in `stream`."""
        new = [[] for _ in input_ids]
        for step in self.stream(input_ids, attention_mask, X_v, sizes, shown, stop=stop, **sampling):
            for row, i in zip(new, step):
                if i is not None:
                    row.append(i)
        return [self.to_text(row, stop) for row in new]

    def to_text(self, ids, stop=()):
        """New ids to the answer they spell: special tokens skipped, cut before the first stop string, stripped."""
        text = self.tokenizer.decode([i for i in ids if i not in self.eos_ids], skip_special_tokens=True)
        return text[:min([text.find(s) for s in stop if s in text], default=None)].strip()

    @property
    def eos_ids(self):
        """Every id that ends a sequence: the tokenizer's and the language model's own list."""
        ids = self.f_phi.generation_config.eos_token_id if self.f_phi.generation_config else None
        return {self.tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def from_parts(cls, vision, llm, feature_layer=-2, dtype=torch.float32, projector="linear"):
        """A new LLaVA from a pretrained CLIP and a pretrained language model, each a hub id or a folder; W is new.

        The tokenizer gets `<image>`. Where the vocabulary has no spare row for it, the embeddings grow to the
        next multiple of 64 (32,000 to 32,064 for Vicuna); new rows are the mean of the old ones.
        """
        g = load_part(VisionTower, vision, "vision", dtype)
        f_phi = load_part(AutoModelForCausalLM, llm, "llm", dtype)
        tokenizer = load_tokenizer(llm)
        old = f_phi.get_input_embeddings().num_embeddings
        if len(tokenizer) > old:
            f_phi.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
            for table in (f_phi.get_input_embeddings().weight, f_phi.get_output_embeddings().weight):
                table.data[old:] = table.data[:old].float().mean(0).to(table.dtype)
        model = cls(g, f_phi, tokenizer, feature_layer, {"vision": vision, "llm": llm}, projector)
        model.W.to(dtype)
        return model

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        """Load one checkpoint folder in llava-hf layout: strict, offline, whatever the folder is called. An adapter's folder
        (lora.py) is loaded as its base with the adapter merged.

        Raises FileNotFoundError for what is no checkpoint, ValueError for keys that are missing or left over.
        """
        if lora.is_adapter(folder):
            model = lora.load_adapter(cls.from_pretrained(lora.base_of(folder), dtype), folder)
            lora.merge(model.f_phi)
            return model
        config, meta, view, projector = load_settings(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if (found := config.image_token_index) != (image_id := tokenizer.convert_tokens_to_ids(IMAGE)):
            raise ValueError(f"{folder}: image_token_index in config.json is {found}; in its tokenizer {IMAGE} is {image_id}")
        with no_init_weights():                          # every weight is about to be overwritten
            g = VisionTower(config.vision_config)
            f_phi = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
            f_phi.tie_weights()
            model = cls(g, f_phi, tokenizer, config.vision_feature_layer, meta, projector)
            model.look(view)
        files = sorted(f for f in os.listdir(folder) if f.endswith(".safetensors"))
        try:
            state = {k: v for f in files for k, v in load_file(os.path.join(folder, f)).items()}
        except SafetensorError as error:
            raise ValueError(f"{folder}: not all of {', '.join(files)} are whole files ({error}); copy them again") from error
        for p in model.parameters():                     # not model.to(dtype): it would round the rotary frequencies too
            p.data = p.data.to(dtype)
        model.load_state_dict(model.from_hf_keys(hf_keys(state), folder), strict=True)
        if os.path.isfile(os.path.join(folder, "generation_config.json")):
            f_phi.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return model.eval()

    def save_pretrained(self, folder, dtype=None, state=None):
        """Write the checkpoint folder that `transformers`, vLLM, SGLang and llama.cpp's converter read.

        `dtype` casts the weights; `state` is the state dict, where it was gathered already. The chat template is the
        tokenizer's; what we add lies under "minllava". A gated g (gated.py) is for us alone: no other program has such blocks,
        and `architectures` names a model that none of them knows.
        """
        dtype, tiling = dtype or next(self.W.parameters()).dtype, self.view.tiling
        gated = "Gated" * bool(getattr(self.g.config, "gated_layers", 0))
        config = (LlavaNextConfig if tiling else LlavaConfig)(           # copies: it writes into the configs that it is given
            vision_config=self.g.config.to_dict() | {"dtype": dtype},
            text_config=self.f_phi.config.to_dict() | {"dtype": dtype},
            image_token_index=self.image_id, image_seq_length=self.N,
            vision_feature_layer=self.feature_layer, vision_feature_select_strategy="default",
            projector_hidden_act=PROJECTORS[self.projector][0], multimodal_projector_bias=True,
            architectures=[f"{gated}Llava{'Next' * bool(tiling)}ForConditionalGeneration"],
            pad_token_id=self.tokenizer.pad_token_id, dtype=dtype, minllava=self.meta)
        os.makedirs(folder, exist_ok=True)
        if os.path.isfile(last := os.path.join(folder, "config.json")):
            os.remove(last)                              # until the folder is whole again
        mine = lora.merged_state(self, state or self.state_dict())         # adapters, if there are any, are part of the weights
        state = {k: v.to(dtype) for k, v in self.to_hf_keys(mine).items()}
        save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
        save_settings(folder, self.tokenizer, self.view, self.eos_ids, config)

    @property
    def prefix(self):
        """Our key prefixes and llava-hf's."""
        return PREFIX | PROJECTORS[self.projector][1]

    def to_hf_keys(self, mine=None):
        """Our state dict, or `mine`, under llava-hf names. A linear W is `linear_1 = W`, identity, `linear_2 = I`."""
        state, mine = {}, mine or self.state_dict()
        for ours, theirs in self.prefix.items():
            state |= {theirs + k[len(ours):]: v for k, v in mine.items() if k.startswith(ours)}
        if self.tied:
            del state["language_model.lm_head.weight"]   # the same tensor as the input embedding
        if self.projector == "linear":
            D, dtype = self.W.out_features, self.W.weight.dtype
            state["multi_modal_projector.linear_2.weight"] = torch.eye(D, dtype=dtype)
            state["multi_modal_projector.linear_2.bias"] = torch.zeros(D, dtype=dtype)
        return state

    def from_hf_keys(self, state, folder):
        """llava-hf names to ours; ValueError if the file's keys are not exactly those we would write."""
        want, whole = self.to_hf_keys(), "pass a whole checkpoint folder, whose config.json is of the same model"
        if missing := sorted(want.keys() - state.keys()):
            raise ValueError(f"{folder}: {len(missing)} weights are missing, e.g. {missing[:5]}; {whole}")
        if extra := sorted(state.keys() - want.keys()):
            raise ValueError(f"{folder}: {len(extra)} weights that this model does not have, e.g. {extra[:5]}; {whole}")
        if wrong := [f"{k} {(*v.shape,)} instead of {(*want[k].shape,)}" for k, v in state.items() if v.shape != want[k].shape]:
            raise ValueError(f"{folder}: {len(wrong)} weights do not have the shape of config.json, e.g. {wrong[:5]}; {whole}")
        if self.projector == "linear":
            eye, zero = (state.pop(f"multi_modal_projector.linear_2.{k}").float() for k in ("weight", "bias"))
            if not (torch.equal(eye, torch.eye(len(eye))) and not zero.any()):
                raise ValueError(f"{folder}: linear_2 is not the identity, so W is not one linear layer")
        ours = {new + k[len(old):]: v for k, v in state.items() for new, old in self.prefix.items() if k.startswith(old)}
        if self.tied:
            ours["f_phi.lm_head.weight"] = ours["f_phi.model.embed_tokens.weight"]
        return ours

    @property
    def tied(self):
        """Whether input embedding and head are one tensor."""
        return self.f_phi.get_input_embeddings().weight is self.f_phi.get_output_embeddings().weight


def sample_id(logits, temperature, top_p, generator=None):
    """One id per row of logits (B, V): the argmax at temperature 0, else a draw from the top_p nucleus."""
    if temperature < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: temperature is at least 0, top_p from 0 to 1")
    if temperature == 0:
        return logits.argmax(-1)                         # (B,)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    p[:, 1:][(p.cumsum(-1) - p)[:, 1:] >= top_p] = 0     # keep ids until their mass reaches top_p; the first always
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]   # (B,)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name="auto", index=0):
    """The device of that name; "auto" takes a GPU (number `index`), else Apple's, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)


def choose_dtype(name, device):
    """(dtype, why): "auto" is bf16 where the device has it, else fp16, else fp32."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bf16"
        return torch.float16, "this GPU lacks bf16"
    return torch.float32, f"{device.type}: half precision gains little here"
