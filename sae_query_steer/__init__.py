"""Steer language models by gradient descent on sparse features of attention queries.

Names are loaded on first use. Importing the package makes its SAE architectures known to SAELens:
at once if SAELens is already imported, otherwise as soon as it is.
"""

from importlib import import_module

import lazy_loader
import wrapt

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("sae_lens")
def _register_architectures(_sae_lens: object) -> None:
    import_module("sae_query_steer.sae")
