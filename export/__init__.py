"""A module -> an artifact -> a callable. Knows nothing of diffusion."""
