"""Which decoder guidance looks through, by the recipe's vocabulary."""

from synthkd.engine.config import Recipe
from synthkd.engine.decoders import Decoder, PooledDecoder
from synthkd.engine.fitted import load_fitted_decoder
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.models import load_tiny_decoder


def looked_through(prior: LatentModel, recipe: Recipe, decoder: str | None = None) -> Decoder:
    """What guidance looks through: the recipe's decoder, or another one in its vocabulary.

    `auto` is the prior's own here: only a set has a folder to keep a fitted one in.
    """
    asked = decoder or recipe.guidance.decoder
    kind, _, rest = asked.partition(":")
    if asked in ("auto", "vae"):
        return prior.decoder
    if kind == "pooled":
        return PooledDecoder(prior.decoder, int(rest))
    if kind == "fitted":
        return load_fitted_decoder(rest, device=prior.device, dtype=prior.dtype, like=prior.decoder)
    return load_tiny_decoder(rest, device=prior.device, dtype=prior.dtype, like=prior.decoder)
