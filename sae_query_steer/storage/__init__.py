"""Folders of safetensors and JSON, read under limits."""
