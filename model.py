"""
LLaVA, but for the layers of g and f_phi: the model of *Visual Instruction Tuning* (arXiv
2304.08485v2), Sec. 4.1.

    X_v --g--> Z_v --W--> H_v --,
                                 >-- f_phi --> X_a          Fig. 1
    X_q -----embedding---> H_q -'

g      CLIP ViT-L/14, frozen (parts/towers.py).
W      one linear layer, the only new module of the paper.
f_phi  a language model, Vicuna in the paper; any causal one with a plain linear head works.

An image is N placeholder tokens <image> in `input_ids`; their embeddings are replaced by H_v.
That is all; only tiles and shared pictures need more, see `splice`.

Letters in shape comments:
    B samples   T tokens of a sample, L in the paper   A answer tokens in the batch   V vocabulary
    K squares of pixels, each what g sees at once: a picture, or a tile of it   S their side
    N visual tokens of one square   D_v width of g   D width of f_phi

Tags in all files: OFFICIAL is what the released code does, OURS our choice where the paper says
nothing or cannot be followed, COURSE a place to experiment; Diss. is Liu's dissertation (2024).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from transformers import DynamicCache

from parts import checkpoints
from parts.files import IMAGE  # "<image>": one reserved id of the tokenizer

LOGITS_AT_ONCE = 2 ** 24                     # tokens x vocabulary: 67 MB in fp32


class LLaVA(nn.Module):

    def __init__(self, g, f_phi, tokenizer, feature_layer=-2, projector="linear", meta=None):
        super().__init__()
        checkpoints.check_parts(projector, feature_layer, g.config)
        self.g = g
        self.f_phi = f_phi
        self.tokenizer = tokenizer
        self.feature_layer = feature_layer   # Z_v: before g's last layer, -2, or after it, -1
        self.projector = projector
        self.meta = meta or {}               # template, view, recipe: config.json keeps it
        D_v = g.config.hidden_size
        D = f_phi.config.hidden_size
        if projector == "linear":
            self.W = nn.Linear(D_v, D)       # OFFICIAL: with a bias; the paper has none
        elif projector == "mlp2x_gelu":      # LLaVA-1.5's two layers, Diss. Sec. 4.3
            self.W = nn.Sequential(nn.Linear(D_v, D), nn.GELU(), nn.Linear(D, D))
        self.newline = None                  # of tiles alone, see `add_newline`
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.set_stage(2)                    # until told otherwise; this sets train_g

    def add_newline(self):
        """LLaVA-NeXT and 1.5-HD see a picture in tiles, and end each row with a learned vector."""
        like = next(self.W.parameters())
        D = self.f_phi.config.hidden_size
        newline = torch.randn(D, dtype=like.dtype, device=like.device)
        self.newline = nn.Parameter(newline / D ** 0.5)

    @property
    def n_used_layers(self):
        """How many layers of g there are before Z_v: all but the last, for feature_layer -2."""
        return len(self.g.encoder.layers) + 1 + self.feature_layer

    @property
    def device(self):
        return next(self.W.parameters()).device

    # -----------------------------------------------------------------------------
    # From pixels and words to the likelihood of the answer

    def encode_images(self, X_v):
        """H_v = W g(X_v): squares of pixels (K, 3, S, S) to tokens in the space of words."""
        with torch.set_grad_enabled(self.train_g and torch.is_grad_enabled()):
            h = self.g.embed(X_v)                                         # (K, 1 + N, D_v)  1: CLS
            for layer in self.g.encoder.layers[:self.n_used_layers]:      # the rest need not run
                h = layer(h, attention_mask=None)
        Z_v = self.g.patches(h)                                           # (K, N, D_v)  without CLS
        H_v = self.W(Z_v.to(next(self.W.parameters()).dtype))             # (K, N, D)    Eq. (1)
        return H_v

    def splice(self, input_ids, X_v, visual_index):
        """Word embeddings, with visual tokens where the placeholders stand: (B, T, D).

        visual_index (placeholders of the batch,) says which row of H_v, flattened, each one gets.
        In the paper's LLaVA the k-th gets the k-th: 0, 1, 2, ... Tiles leave out padding and end
        their rows by -1, the newline; a picture that several samples show is encoded once, and its
        rows are named several times.
        """
        H_q = self.f_phi.get_input_embeddings()(input_ids)                # (B, T, D)  of all words
        H_v = self.encode_images(X_v).flatten(0, 1)                       # (K N, D)
        if self.newline is not None:
            H_v = torch.cat([H_v, self.newline[None].to(H_v.dtype)])      # last, where -1 finds it
        H_v = H_v[visual_index].to(H_q.dtype)                             # (placeholders, D)
        is_image = (input_ids == self.image_id).flatten()                 # (B T,)
        torch._assert_async(is_image.sum() == len(H_v), "one placeholder for each visual token")
        # `nonzero` would wait for a GPU to count them; how many there are is known here
        places = is_image.nonzero_static(size=len(H_v))[:, 0]             # (placeholders,)
        return H_q.flatten(0, 1).index_copy(0, places, H_v).view_as(H_q)  # (B, T, D)

    def answer_states(self, input_ids, answer_index, X_v, visual_index):
        """The states that predict answer tokens, one place before them, (A, D), and these, (A,).

        answer_index (A,) says where they stand, the rows laid end to end. Samples are padded on
        the right, where causal attention never looks; without a mask it can use flash kernels.
        """
        H = self.splice(input_ids, X_v, visual_index)                     # (B, T, D)
        h = self.f_phi.base_model(inputs_embeds=H, use_cache=False).last_hidden_state
        targets = input_ids.flatten()[answer_index]                       # (A,)
        return h.flatten(0, 1)[answer_index - 1], targets                 # (A, D), (A,)

    def answer_nll(self, h, targets):
        """-log p of each answer token, (A,). Only these get logits, never all (B, T, V)."""
        logits = self.f_phi.get_output_embeddings()(h)                    # (A, V)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def forward(self, input_ids, answer_index, X_v, visual_index):
        """-log p(X_a | X_v, X_instruct), Eq. (3): the sum over the A answer tokens, and A.

        The caller divides by the answer tokens of the whole global batch, so that the loss depends
        neither on accumulation nor on the number of ranks. OFFICIAL: the mean of the micro-batches'
        means; there a token weighs more in a micro-batch with few of them.
        """
        h, targets = self.answer_states(input_ids, answer_index, X_v, visual_index)
        chunk = max(1, LOGITS_AT_ONCE // self.f_phi.config.vocab_size)
        total = 0.0
        for some_h, some_targets in zip(h.split(chunk), targets.split(chunk), strict=True):
            # logits are the largest tensor of all: a chunk at a time, again in the backward pass
            nll = recompute(self.answer_nll, some_h, some_targets, use_reentrant=False)
            total = total + nll.sum()
        return total, len(targets)

    # -----------------------------------------------------------------------------
    # What trains

    def set_stage(self, stage, train_g=False):
        """theta = {W} in stage 1, {W, phi} in stage 2 (Sec. 4.2). Returns {name: parameter}.

        g is frozen in both. train_g: LLaVA-NeXT trains it in stage 2, except the layers after Z_v.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage {stage}: there are stage 1 (theta = W) and 2 (theta = W, phi)")
        self.train_g = train_g and stage == 2
        self.g.requires_grad_(self.train_g)
        for unused in [*self.g.encoder.layers[self.n_used_layers:], self.g.post_layernorm]:
            unused.requires_grad_(False)
        self.W.requires_grad_(True)
        self.f_phi.requires_grad_(stage == 2)             # COURSE: True: why freeze it in stage 1?
        if self.newline is not None:
            self.newline.requires_grad_(stage == 2)       # OFFICIAL: with the language model
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # -----------------------------------------------------------------------------
    # Answers. This is the clear version; parts/engine.py gives the same tokens faster.

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, X_v, visual_index, max_new_tokens=512,
                 stop=(), **sampling):
        """Answers X_a, a string for each row. Prompts are padded on the left.

        stop       strings that end an answer, as the end of sequence does
        sampling   temperature, top_p, generator: see `sample_id`; the default is greedy
        """
        cache = DynamicCache(config=self.f_phi.config)
        H = self.splice(input_ids, X_v, visual_index)                     # (B, T, D)
        position = attention_mask.cumsum(1).sub(1).clamp(min=0)           # (B, T)  without padding
        answers = [[] for _ in input_ids]
        for _ in range(max_new_tokens):
            out = self.f_phi(inputs_embeds=H, attention_mask=attention_mask, position_ids=position,
                             past_key_values=cache, use_cache=True, logits_to_keep=1)
            new_ids = self.choose_ids(out.logits[:, -1], **sampling)      # (B,)
            for ids, new in zip(answers, new_ids.tolist(), strict=True):
                ids.append(new)
            if all(self.has_ended(ids, stop) for ids in answers):         # to_text cuts surplus off
                break
            H = self.f_phi.get_input_embeddings()(new_ids)[:, None]       # (B, 1, D)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)       # (B, one more)
            position = position[:, -1:] + 1                               # (B, 1)
        return [self.to_text(ids, stop) for ids in answers]

    def choose_ids(self, logits, **sampling):
        """The next token of each row, (B,), by its logits (B, V); never <image>. ValueError for
        NaN or infinite logits, from which any token could be drawn."""
        logits = logits.float()
        if not -torch.inf < logits.sum().item() < torch.inf:      # NaN, too; faster than isfinite
            checkpoints.check_finite({"logits": logits}, "no word can be drawn (fp16? try bf16)")
        logits[:, self.image_id] = -torch.inf
        return sample_id(logits, **sampling)

    @property
    def eos_ids(self):
        """The ids that end an answer: the tokenizer's, and the language model's own list."""
        ids = self.f_phi.generation_config.eos_token_id
        if not isinstance(ids, list):
            ids = [ids]
        return {self.tokenizer.eos_token_id, *ids} - {None}

    def has_ended(self, ids, stop):
        text = self.tokenizer.decode(ids)
        return not self.eos_ids.isdisjoint(ids) or any(word in text for word in stop)

    def to_text(self, ids, stop=()):
        """An answer's ids as text: up to the end of sequence or the first stop string, stripped."""
        end = next((k for k, i in enumerate(ids) if i in self.eos_ids), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        for word in stop:
            text = text.split(word)[0]
        return text.strip()

    @torch.no_grad()
    def score(self, input_ids, answer_index, X_v, visual_index):
        """log p(X_a | X_v, X_instruct) of each row's answer, (B,): extras/probe.py ranks by it."""
        h, targets = self.answer_states(input_ids, answer_index, X_v, visual_index)
        log_p = -self.answer_nll(h, targets)                              # (A,)
        checkpoints.check_finite({"log p": log_p}, "these answers have no score")
        row = answer_index // input_ids.shape[1]                          # (A,)  a token's sample
        return log_p.new_zeros(len(input_ids)).index_add_(0, row, log_p)  # (B,)

    # -----------------------------------------------------------------------------
    # From pretrained parts, and to and from a checkpoint folder (parts/checkpoints.py)

    @classmethod
    def from_parts(cls, vision, llm, dtype=torch.float32, **options):
        """A new LLaVA, with a random W. dtype None: g and f_phi stay as their files have them."""
        g, shown = checkpoints.load_tower(vision, dtype)
        f_phi = checkpoints.load_language_model(llm, dtype)
        tokenizer = checkpoints.load_tokenizer(llm)       # with <image>
        checkpoints.grow_vocabulary(f_phi, len(tokenizer))
        meta = {"vision": vision, "llm": llm, **shown}    # and how g was shown pictures
        model = cls(g, f_phi, tokenizer, meta=meta, **options)
        model.W.to(dtype or torch.float32)
        return model

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        return checkpoints.load(cls, folder, dtype)

    def save_pretrained(self, folder, dtype=None, state=None):
        checkpoints.save(self, folder, dtype, state)


def sample_id(logits, temperature=0.0, top_p=1.0, generator=None):
    """One id for each row of logits (B, V): the argmax at temperature 0, else a draw.

    top_p   draw from the likeliest ids alone, as many as have this mass together
    """
    if temperature == 0:
        return logits.argmax(-1)                                          # (B,)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)      # (B, V), (B, V)
    mass_before = p.cumsum(-1) - p                                        # (B, V)
    beyond = mass_before >= top_p
    beyond[:, 0] = False                                                  # the likeliest remains
    choice = torch.multinomial(p.masked_fill(beyond, 0), 1, generator=generator)     # (B, 1)
    return order.gather(-1, choice)[:, 0]                                 # (B,)
