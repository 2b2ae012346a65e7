"""Bundles: SAEs, centroids and a steerer in one folder, for the hub and for SAELens's registry."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
