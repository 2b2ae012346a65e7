"""What descent on latents is compared with."""
