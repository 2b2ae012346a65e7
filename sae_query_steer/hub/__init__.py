"""Bundles: SAEs, centroids and a steerer in one folder, for the hub and for SAELens's registry."""

from sae_query_steer.hub.bundle import Bundle, load_bundle, save_bundle
from sae_query_steer.hub.hub import Upload, from_pretrained, push_to_hub
from sae_query_steer.hub.registry import registry_entry

__all__ = [
    "Bundle",
    "Upload",
    "from_pretrained",
    "load_bundle",
    "push_to_hub",
    "registry_entry",
    "save_bundle",
]
