"""Folders of safetensors and JSON: written atomically, read back under limits."""
