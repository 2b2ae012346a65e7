"""Other libraries' interfaces to a steered model; each needs the extra of its name."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
