"""The tutor: a toy language model whose feedback has a Bloom level that one layer's queries select.

`load_tutor` returns the model; `TutorCorpus` generates its texts. `experiments/tutor` trained it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
