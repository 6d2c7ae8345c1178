"""
LLaVA's g, the vision tower: CLIP's, as in the paper, or SigLIP's.

    X_v --embed--> h --some of encoder.layers--> h --patches--> Z_v          model.encode_images

              behind `embed`                          what it was shown while it was pretrained
    CLIP      CLS and N patches, a layer norm         a picture's middle, with CLIP's own mean
    SigLIP    N patches                               all of it, squeezed into a square; mean 0.5

SigLIP2 of fixed resolution is SigLIP with other weights, and its files say so. The one with NaFlex
in its name, whose squares are none, is another model. A tower more is a class more in TOWERS.
"""
from transformers import CLIPVisionModel, SiglipVisionModel

from parts.gated import gate_as_configured
from parts.views import CLIP_PIXELS, Pixels


class CLIPTower(CLIPVisionModel):
    """CLIP's image tower, with gated blocks if its config has `gated_layers`."""
    base_model_prefix = "vision_model"   # its name in the files of a CLIP with both towers
    has_cls = True
    shown = {"aspect": "crop", "pixels": CLIP_PIXELS}

    def __init__(self, config):
        super().__init__(config)
        gate_as_configured(self)

    def embed(self, X_v):
        """Squares (K, 3, S, S) to what g's first layer takes, (K, 1 + N, D_v)."""
        return self.pre_layrnorm(self.embeddings(X_v))       # (sic)

    def patches(self, h):
        """(K, 1 + N, D_v) to (K, N, D_v): without CLS."""
        return h[:, 1:]


class SiglipTower(SiglipVisionModel):
    """SigLIP's image tower, without the head that pools its patches to one vector."""
    has_cls = False
    shown = {"aspect": "squeeze", "pixels": Pixels((0.5,) * 3, (0.5,) * 3)}

    def __init__(self, config):
        config.vision_use_head = False
        super().__init__(config)

    def embed(self, X_v):
        """Squares (K, 3, S, S) to what g's first layer takes, (K, N, D_v)."""
        return self.embeddings(X_v)

    def patches(self, h):
        return h


TOWERS = {"clip": CLIPTower, "siglip": SiglipTower}


def tower_class(kind):
    """The class of a model_type of Hugging Face, of a tower or of a model with both towers.

    Raises ValueError for one that this project does not compute.
    """
    name = str(kind).removesuffix("_vision_model")
    if name not in TOWERS:
        raise ValueError(f"a vision tower of model_type {kind!r}; what can be g here is CLIP "
                         "('clip'), and SigLIP or SigLIP2 of fixed resolution ('siglip')")
    return TOWERS[name]
