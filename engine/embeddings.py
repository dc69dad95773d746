"""Guidance scales as an embedding, for denoisers that take them as an input."""

import torch
from torch import Tensor


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """Sinusoidal embedding [1,width], float32, of 1000 w with w = guidance_scale - 1 (arXiv 2310.04378, section 4.2).

    The angles reach thousands, where float32 rounds visibly: they are formed in the order the UNets were trained with.
    """
    half = width // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.tensor(10000.0).log() / (half - 1)))
    angle = torch.tensor([guidance_scale - 1.0]) * 1000.0 * frequency
    return torch.cat([angle.sin(), angle.cos(), torch.zeros(width % 2)])[None]
