"""Sizes of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo; `QUICK` holds smaller ones, `FULL` larger."""

    seed: int = 0
    n_train: int = 300
    """Labelled prompts, of each kind, for SAEs and centroids."""

    n_validation: int = 36
    """Cases of each task on which strengths are chosen."""

    n_test: int = 204
    """Cases of each task in the table."""

    n_pairs: int = 180
    """Pairs of the interchange effect."""

    training_tokens: int = 100_000
    """Tokens that the SAEs are trained on."""

    d_sae_per_head: int = 64
    k: int = 8

    every_method: bool = False
    """Also what `more_methods` names, few-shot prompts of 1 and 4, and three random directions."""

    def __post_init__(self) -> None:
        for name, least in (("n_train", 60), ("n_validation", 6), ("n_test", 6), ("n_pairs", 6)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not allowed: give {least} or more"
                )


QUICK = DemoSettings(n_train=120, n_validation=12, n_test=36, n_pairs=60, training_tokens=60_000)
"""Sizes for a first look; too small to tell methods apart."""

FULL = DemoSettings(n_validation=60, n_test=300, every_method=True)
"""The full comparison, in about half an hour."""
