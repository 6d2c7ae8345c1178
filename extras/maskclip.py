"""
Zero-shot semantic segmentation with CLIP, as MaskCLIP does it: what each patch is most similar to.

    features of each patch --class vectors--> (C, rows, columns) --bilinear--> a class a pixel

`python -m extras.react_eval segment` compares CLIPs by it. MaskCLIP's refinements (key smoothing,
prompt denoising) and its training with pseudo-labels, MaskCLIP+, are left out here.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from parts.pictures import image_path
from parts.views import preprocess

NO_CLASS = 255                           # in a mask: a pixel that is not counted


@torch.inference_mode()
def dense_features(clip, X_v):
    """Features of each patch, (B, N, D), of length 1: what X_v (B, 3, S, S) shows there.

    In CLIP's last layer each token attends to itself alone, so that its value takes the place of
    attention; then come that layer's MLP, the last norm and the projection, as for the class token.
    OURS: a gated block before that layer attends to all tokens, as it did in training.
    """
    tower = clip.vision_model
    *layers, last = tower.encoder.layers
    x = tower.pre_layrnorm(tower.embeddings(X_v))        # (B, 1 + N, D_v)
    for layer in layers:
        x = layer(x, None)
    if hasattr(last, "gated"):
        x = last.gated(x)
    alone = x[:, 1:].flatten(0, 1)[:, None]              # (B N, 1, D_v)
    h = CLIPEncoderLayer.forward(last, alone, None)      # (B N, 1, D_v)
    h = h.view(len(x), -1, x.shape[-1])                  # (B, N, D_v)
    u = clip.visual_projection(tower.post_layernorm(h))
    return F.normalize(u.float(), dim=-1)


def read_mask(path, size, C):
    """The class of each pixel, (height, width): 0 to C - 1, or 255 for one that is not counted."""
    with Image.open(path) as mask:
        if mask.mode not in ("L", "P") or mask.size != size:
            raise ValueError(f"{path}: mode {mask.mode}, {mask.size}; needed is a mask in grey or "
                             f"with a palette (L or P), as large as its picture, {size}")
        truth = torch.from_numpy(np.array(mask)).long()
    others = truth[(truth >= C) & (truth != NO_CLASS)].unique().tolist()
    if others:
        raise ValueError(f"{path}: classes {others[:5]}; there are 0 to {C - 1}, and {NO_CLASS} "
                         "for pixels that are not counted")
    return truth


def mean_iou(confusion):
    """Mean over classes of intersection over union, of confusion[truth, found] in pixels.

    A class that is neither there nor found does not count.
    """
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    counts = union > 0
    shares = hit[counts] / union[counts]
    return shares.mean().item()


def segmentation_score(clip, W, pairs, config):
    """mIoU, and the share of pixels that are right, of what each patch is most similar to.

    OURS: the whole picture is squeezed into one square of the tower's size.
    """
    C = len(W)
    size = clip.config.vision_config.image_size
    confusion = torch.zeros(C, C)
    for pair in pairs:
        picture = pair.picture()
        mask = image_path(config.images, pair.text)
        truth = read_mask(mask, picture.size, C)
        square = picture.resize((size, size), Image.Resampling.BICUBIC)
        X_v = preprocess(square, size)[None]             # (1, 3, S, S)
        u = dense_features(clip, X_v.to(clip.device))
        side = math.isqrt(u.shape[1])
        similar = W @ u[0].T                             # (C, N)
        similar = similar.view(C, side, side)            # (C, rows, columns)
        similar = F.interpolate(similar[None], truth.shape, mode="bilinear")
        found = similar[0].argmax(0).cpu()               # (height, width)
        counted = truth != NO_CLASS
        cells = C * truth[counted] + found[counted]
        confusion += torch.bincount(cells, minlength=C * C).view(C, C)
    right = confusion.diagonal().sum() / confusion.sum()
    return {"mIoU": mean_iou(confusion), "pixels": right.item()}
