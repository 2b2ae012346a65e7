"""What SAELens 6 imports of TransformerLens that version 4 removed; import this before SAELens.

SAELens needs the classes for annotations and `isinstance` alone, and of a bridge none of them.
"""

import sys
from types import ModuleType

import transformer_lens
import transformer_lens.utilities
from transformer_lens.HookedRootModule import HookedRootModule


class Removed:
    """Stands for classes that there are no more: nothing is one."""


def add_module(name: str, **names: type) -> None:
    """Make a module of TransformerLens that holds these names."""
    module = ModuleType(f"transformer_lens.{name}")
    vars(module).update(names)
    sys.modules[module.__name__] = module


vars(transformer_lens)["HookedTransformer"] = Removed
removed = dict.fromkeys(["HookedTransformer", "Loss", "Output"], Removed)
add_module("HookedTransformer", HookedRootModule=HookedRootModule, **removed)
add_module("components")
add_module("components.mlps")
add_module("components.mlps.can_be_used_as_mlp", CanBeUsedAsMLP=Removed)
sys.modules["transformer_lens.utils"] = transformer_lens.utilities
