"""Which latents did it, and what they stand for."""
