"""SAEs of query heads: all heads of a layer in one SAELens object.

Importing this package registers its architectures with SAELens.
"""

import lazy_loader
import sae_lens  # noqa: F401  (first: its import hook imports this package, never half of it)

from sae_query_steer.sae import penalised, topk  # noqa: F401  (their classes register themselves)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
