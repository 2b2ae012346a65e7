"""Diagnostics: which sites can be steered, what a steer achieved, and what is in the SAEs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
