"""Steer language models by gradient descent on sparse features of attention queries.

The names below follow the way of the data: sites, SAEs, labelled texts, centroids, checks,
steering, comparison. Importing the package registers its SAE architectures with SAELens.
"""

from sae_query_steer.baselines.decoder_rows import DecoderRowsSteerer
from sae_query_steer.baselines.residual import ResidualMeanDifference
from sae_query_steer.baselines.residual_stream import ResidualMeans, residual_means
from sae_query_steer.baselines.simple import (
    RandomDirectionSteerer,
    few_shot_prompt,
    mean_difference,
)
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.dashboards.writing import write_dashboards
from sae_query_steer.data.examples import (
    LabelledExample,
    TokenizedExample,
    tokenize_example,
    tokenize_examples,
)
from sae_query_steer.data.readers import (
    examples_from_csv,
    examples_from_dataset,
    examples_from_jsonl,
    texts_from_file,
)
from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.latent_choice import (
    ActiveLatents,
    ExceptLatents,
    GivenLatents,
    LatentAbove,
    PosteriorBelow,
    TopLatents,
)
from sae_query_steer.descent.loop import Bounds, DescentResult, descend
from sae_query_steer.descent.objectives import (
    AutogradObjective,
    CentroidContrast,
    CosineSimilarity,
    GaussianLogLikelihood,
    LinearProbe,
    Objective,
    PrototypeLogLikelihood,
    SquaredDistance,
)
from sae_query_steer.descent.strength import ExponentialDecay, LinearWarmUp
from sae_query_steer.diagnostics.achieved import achieved_effect
from sae_query_steer.diagnostics.interchange import interchange_effect
from sae_query_steer.diagnostics.latent_attention import latent_attention
from sae_query_steer.diagnostics.latent_texts import top_activating_texts, top_tokens
from sae_query_steer.diagnostics.moved import most_moved, moved_latents
from sae_query_steer.diagnostics.sae_scores import evaluate_saes
from sae_query_steer.diagnostics.separability import separability
from sae_query_steer.diagnostics.site_verdicts import site_verdicts
from sae_query_steer.diagnostics.top_tokens import TopTokens
from sae_query_steer.hub import (
    Bundle,
    Upload,
    from_pretrained,
    load_bundle,
    push_to_hub,
    registry_entry,
    save_bundle,
)
from sae_query_steer.models.loading import load_model
from sae_query_steer.plots import plot_posterior, plot_sites, plot_trace
from sae_query_steer.sae import (
    QueryHeadBatchTopKTrainingSAEConfig,
    QueryHeadGatedTrainingSAEConfig,
    QueryHeadJumpReLUTrainingSAEConfig,
    QueryHeadKLSparseTrainingSAEConfig,
    QueryHeadMatryoshkaBatchTopKTrainingSAEConfig,
    QueryHeadSAE,
    QueryHeadStandardTrainingSAEConfig,
    QueryHeadTopKTrainingSAEConfig,
)
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.encoders import IdentityEncoder, QueryEncoder, identity_encoders
from sae_query_steer.sae.heads import join_heads, split_heads
from sae_query_steer.scopes.marked import AfterToken, AtPositions, RowMask
from sae_query_steer.scopes.named import (
    FirstResponseTokens,
    LastPromptTokens,
    PromptTokens,
    Window,
    WindowAroundPromptEnd,
)
from sae_query_steer.scopes.positions import (
    AllOf,
    AnyOf,
    EveryPosition,
    LastPromptToken,
    LastResponseToken,
    Not,
    Positions,
    ResponseTokens,
)
from sae_query_steer.sites import QuerySite, query_sites
from sae_query_steer.steering.attach import attached_saes
from sae_query_steer.steering.files import load_steerer, save_steerer
from sae_query_steer.steering.joined import JoinedSteerers
from sae_query_steer.steering.partial import PartialSteerer
from sae_query_steer.steering.steerer import LatentGradientSteerer
from sae_query_steer.steering.trace import SteeringTrace
from sae_query_steer.targets.builder import CentroidTargetBuilder
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.toy.tutor.pretrained import load_tutor
from sae_query_steer.training.distributed import train_on_ranks
from sae_query_steer.training.train import train_query_saes

__all__ = [
    "ActiveLatents",
    "AfterToken",
    "AllOf",
    "AnyOf",
    "AtPositions",
    "AutogradObjective",
    "BloomLevel",
    "Bounds",
    "Bundle",
    "CentroidContrast",
    "CentroidTargetBuilder",
    "CentroidTargets",
    "CosineSimilarity",
    "DecoderRowsSteerer",
    "DescentResult",
    "EveryPosition",
    "ExceptLatents",
    "ExponentialDecay",
    "FirstResponseTokens",
    "GaussianLogLikelihood",
    "GivenLatents",
    "Goal",
    "IdentityEncoder",
    "JoinedSteerers",
    "LabelledExample",
    "LastPromptToken",
    "LastPromptTokens",
    "LastResponseToken",
    "LatentAbove",
    "LatentGradientSteerer",
    "LinearProbe",
    "LinearWarmUp",
    "Not",
    "Objective",
    "PartialSteerer",
    "Positions",
    "PosteriorBelow",
    "PromptTokens",
    "PrototypeLogLikelihood",
    "QueryEncoder",
    "QueryHeadBatchTopKTrainingSAEConfig",
    "QueryHeadGatedTrainingSAEConfig",
    "QueryHeadJumpReLUTrainingSAEConfig",
    "QueryHeadKLSparseTrainingSAEConfig",
    "QueryHeadMatryoshkaBatchTopKTrainingSAEConfig",
    "QueryHeadSAE",
    "QueryHeadStandardTrainingSAEConfig",
    "QueryHeadTopKTrainingSAEConfig",
    "QuerySAEs",
    "QuerySite",
    "RandomDirectionSteerer",
    "ResidualMeanDifference",
    "ResidualMeans",
    "ResponseTokens",
    "RowMask",
    "SquaredDistance",
    "SteeringTrace",
    "TokenizedExample",
    "TopLatents",
    "TopTokens",
    "Upload",
    "Window",
    "WindowAroundPromptEnd",
    "achieved_effect",
    "attached_saes",
    "descend",
    "evaluate_saes",
    "examples_from_csv",
    "examples_from_dataset",
    "examples_from_jsonl",
    "few_shot_prompt",
    "from_pretrained",
    "identity_encoders",
    "interchange_effect",
    "join_heads",
    "latent_attention",
    "load_bundle",
    "load_model",
    "load_steerer",
    "load_tutor",
    "mean_difference",
    "most_moved",
    "moved_latents",
    "plot_posterior",
    "plot_sites",
    "plot_trace",
    "push_to_hub",
    "query_sites",
    "registry_entry",
    "residual_means",
    "save_bundle",
    "save_steerer",
    "separability",
    "site_verdicts",
    "split_heads",
    "texts_from_file",
    "tokenize_example",
    "tokenize_examples",
    "top_activating_texts",
    "top_tokens",
    "train_on_ranks",
    "train_query_saes",
    "write_dashboards",
]
