"""
The tokens of model.generate, faster: rows that have ended leave, and a conversation's next turn
starts where its last one ended.

    a batch --stream--> ids, step by step --pieces--> text, as soon as it is sure

parts/decoders.py has what happens within a step.

Letters in shape comments:    B rows   n tokens of the prompt   D width of f_phi   V vocabulary
"""
from hashlib import sha256

import torch
import torch.nn.functional as F

from parts.decoders import decoder_for, quantise
from parts.ranks import ANSWERING

MAX_PREFIXES = 4         # conversations whose keys and values are remembered
MIN_SHARED = 64          # tokens; fewer are soon computed anew, and no conversation is cut for them


class Prefix:
    """The start of one conversation in a cache, for its next turn.

    keys    what each token is to the cache: a word's id; for a visual token (number of its picture
            in the conversation, the picture's name). Those beyond the cache's length are to come.
    """

    def __init__(self, keys=()):
        self.keys = list(keys)
        self.cache = None

    def shared(self, keys):
        """How many tokens at the start of a prompt are in the cache; no picture is cut.

        The last token is never among them, for the next word is seen from there.
        """
        n = 0
        most = min(self.cache.length, len(keys) - 1)
        while n < most and self.keys[n] == keys[n]:
            n += 1
        while n > 0 and isinstance(keys[n], tuple) and keys[n - 1] == keys[n]:
            n -= 1
        return n


class Engine:
    """Answers of a LLaVA whose weights change no more, token for token those of model.generate."""

    def __init__(self, model, compile=False, int8=False):
        if int8:
            quantise(model.f_phi)
        self.model = model
        self.decoder = decoder_for(model.f_phi, compile)
        self.prefixes = []               # of the last conversations, the newest last

    def generate(self, batch, stop=(), **sampling):
        """Answers X_a, one string a row. Arguments as in `stream`."""
        new = [[] for _ in batch["input_ids"]]
        for step in self.stream(batch, stop, **sampling):
            for row, i in zip(new, step, strict=True):
                if i is not None:
                    row.append(i)
        return [self.model.to_text(row, stop) for row in new]

    @torch.no_grad()
    def stream(self, batch, stop=(), max_new_tokens=512, prefix=None, **sampling):
        """Yield the next ids of each step, one a row; None for a row that has ended.

        batch       of data.collate, padded on the left.
        stop        strings that end a row, as an end-of-sequence id does; what ends it is yielded.
        prefix      of `recall`: the batch is one row, and what lies behind the prefix.
        sampling    temperature, top_p, generator: see `model.sample_id`; the default is greedy
        Once half of the rows have ended, the others go on without them, unless steps are compiled.
        Raises ValueError if the prompt leaves no room in the model's context.
        """
        model, decoder = self.model, self.decoder
        batch = {name: batch[name].to(model.device) for name in ANSWERING}
        prefix = prefix or Prefix()
        start = prefix.cache.length if prefix.cache else 0
        B, n = batch["input_ids"].shape
        context = model.f_phi.config.max_position_embeddings
        if start + n >= context:         # not even one word of an answer would fit
            raise ValueError(f"the prompt is {start + n} tokens, those of pictures included; the "
                             f"model's context is {context}")
        steps = min(max_new_tokens, context - start - n)
        prefix.cache = prefix.cache or decoder.cache(B, start + n + steps)

        H = self.embed(batch)                                                # (B, n, D)
        mask = batch["attention_mask"]                                       # (B, n)
        position = start + mask.cumsum(1).sub(1).clamp(min=0)                # (B, n)
        mask = None if mask.all() else mask
        window = 8 + max((len(text.encode()) for text in stop), default=0)   # ids that hold a stop
        rows = list(range(B))            # which row of the batch each row is that is computed
        new = [[] for _ in rows]
        ended = set()
        for _ in range(steps):
            logits = decoder.extend(prefix.cache, H, position, mask)         # (rows, V)
            new_ids = model.choose_ids(logits, **sampling)                   # (rows,)
            step = [None] * B
            for row, i in zip(rows, new_ids.tolist(), strict=True):
                if row not in ended:
                    step[row] = i
                    new[row].append(i)
                    if model.has_ended(new[row][-window:], stop):
                        ended.add(row)
            yield step
            left = [k for k, row in enumerate(rows) if row not in ended]
            if not left:
                return
            if decoder.shrinks and len(left) <= len(rows) // 2:
                rows = [rows[k] for k in left]
                left = torch.tensor(left, device=H.device)
                decoder.select(prefix.cache, left)
                new_ids, position = new_ids[left], position[left]
                mask = None if mask is None else mask[left]
            prefix.keys.append(step[0])
            H = model.f_phi.get_input_embeddings()(new_ids)[:, None]         # (rows, 1, D)
            position = position[:, -1:] + 1
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)

    def embed(self, batch):
        """The prompt as f_phi sees it. The blank square of a batch of text is not encoded."""
        if len(batch["visual_index"]) == 0:
            return self.model.f_phi.get_input_embeddings()(batch["input_ids"])
        return self.model.splice(batch["input_ids"], batch["X_v"], batch["visual_index"])

    def pieces(self, batch, prefix, ids=None, stop=(), **sampling):
        """The answer to one row as text, piece by piece; its ids are appended to the list `ids`.

        Held back is what may not be part of it: half a character (U+FFFD), the beginning of a stop
        string, blanks at the end. Joined, the pieces are what `generate` returns.
        """
        ids = [] if ids is None else ids
        n_shown = 0
        try:
            for (new,) in self.stream(batch, stop, prefix=prefix, **sampling):
                ids.append(new)
                text = self.model.to_text(ids, stop)
                n_sure = len(text[:len(text) - begun_stop(text, stop)].rstrip())
                if n_sure > n_shown and not text.endswith("\ufffd"):
                    yield text[n_shown:n_sure]
                    n_shown = n_sure
            yield self.model.to_text(ids, stop)[n_shown:]
        finally:                         # a stopped answer, too, is part of the conversation
            if self.decoder.reuses and prefix.cache:
                self.prefixes = [*self.prefixes, prefix][-MAX_PREFIXES:]

    def recall(self, sample, view):
        """(prefix, rest): an earlier conversation that starts as this prompt, and what is new.

        The prefix is cut to what they share, and is this prompt's until `pieces` gives it back.
        """
        visual = []
        for number, (name, picture) in enumerate(sample["pictures"]):
            visual += [(number, name)] * view.tokens(*picture.size)
        visual = iter(visual)
        ids = sample["input_ids"]
        keys = [next(visual) if i == self.model.image_id else i for i in ids]
        lengths = [prefix.shared(keys) for prefix in self.prefixes]
        n = max(lengths, default=0)
        if n < MIN_SHARED:
            return Prefix(keys), sample
        prefix = self.prefixes.pop(lengths.index(n))
        prefix.keys = keys
        prefix.cache.length = n
        seen = {key for key in keys[:n] if isinstance(key, tuple)}
        rest = {"input_ids": ids[n:], "labels": sample["labels"][n:],
                "pictures": sample["pictures"][len(seen):]}
        return prefix, sample | rest


def content_name(picture):
    """A name that the same picture (PIL) has wherever it comes from."""
    return picture.size, sha256(picture.tobytes()).hexdigest()


def begun_stop(text, stop):
    """How many characters at the end of a text are the beginning of a stop string."""
    beginnings = [end[:n] for end in stop for n in range(len(end))]
    return max((len(start) for start in beginnings if text.endswith(start)), default=0)
