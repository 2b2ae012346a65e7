from .baselines.decoder_rows import decoder_rows as decoder_rows
from .baselines.residual import residual_mean_difference as residual_mean_difference
from .baselines.residual import residual_means as residual_means
from .baselines.simple import (
    few_shot_prompt as few_shot_prompt,
)
from .baselines.simple import (
    mean_difference as mean_difference,
)
from .baselines.simple import (
    random_direction as random_direction,
)
from .bloom import BloomLevel as BloomLevel
from .config import TopK as TopK
from .config import TrainingConfig as TrainingConfig
from .dashboards.writing import write_dashboards as write_dashboards
from .data.examples import (
    LabelledExample as LabelledExample,
)
from .data.readers import (
    read_examples as read_examples,
)
from .data.readers import (
    read_texts as read_texts,
)
from .data.tokenized import (
    TokenizedExample as TokenizedExample,
)
from .data.tokenized import (
    TokenizedExamples as TokenizedExamples,
)
from .data.tokenized import (
    tokenize_example as tokenize_example,
)
from .data.tokenized import (
    tokenize_examples as tokenize_examples,
)
from .descent.control import (
    ActiveLatents as ActiveLatents,
)
from .descent.control import Bounds as Bounds
from .descent.control import (
    ExceptLatents as ExceptLatents,
)
from .descent.control import ExponentialDecay as ExponentialDecay
from .descent.control import (
    GivenLatents as GivenLatents,
)
from .descent.control import (
    LatentAbove as LatentAbove,
)
from .descent.control import LinearWarmUp as LinearWarmUp
from .descent.control import (
    PosteriorBelow as PosteriorBelow,
)
from .descent.control import (
    TopLatents as TopLatents,
)
from .descent.goals import Goal as Goal
from .descent.loop import DescentResult as DescentResult
from .descent.loop import descend as descend
from .descent.objectives import (
    AutogradObjective as AutogradObjective,
)
from .descent.objectives import (
    CentroidContrast as CentroidContrast,
)
from .descent.objectives import (
    CosineSimilarity as CosineSimilarity,
)
from .descent.objectives import (
    GaussianLogLikelihood as GaussianLogLikelihood,
)
from .descent.objectives import (
    LinearProbe as LinearProbe,
)
from .descent.objectives import (
    Objective as Objective,
)
from .descent.objectives import (
    PrototypeLogLikelihood as PrototypeLogLikelihood,
)
from .descent.objectives import (
    SquaredDistance as SquaredDistance,
)
from .diagnostics.interchange import achieved_effect as achieved_effect
from .diagnostics.interchange import interchange_effect as interchange_effect
from .diagnostics.latent_attention import latent_attention as latent_attention
from .diagnostics.latent_texts import (
    top_activating_texts as top_activating_texts,
)
from .diagnostics.latent_texts import (
    top_tokens as top_tokens,
)
from .diagnostics.moved import most_moved as most_moved
from .diagnostics.moved import moved_latents as moved_latents
from .diagnostics.sae_scores import evaluate_saes as evaluate_saes
from .diagnostics.separability import separability as separability
from .diagnostics.site_verdicts import site_verdicts as site_verdicts
from .diagnostics.top_tokens import TopTokens as TopTokens
from .hub import (
    Bundle as Bundle,
)
from .hub import (
    Upload as Upload,
)
from .hub import (
    from_pretrained as from_pretrained,
)
from .hub import (
    load_bundle as load_bundle,
)
from .hub import (
    push_to_hub as push_to_hub,
)
from .hub import (
    registry_entry as registry_entry,
)
from .hub import (
    save_bundle as save_bundle,
)
from .models.loading import load_model as load_model
from .plots import (
    plot_posterior as plot_posterior,
)
from .plots import (
    plot_sites as plot_sites,
)
from .plots import (
    plot_trace as plot_trace,
)
from .sae import (
    QueryHeadBatchTopKTrainingSAEConfig as QueryHeadBatchTopKTrainingSAEConfig,
)
from .sae import (
    QueryHeadGatedTrainingSAEConfig as QueryHeadGatedTrainingSAEConfig,
)
from .sae import (
    QueryHeadJumpReLUTrainingSAEConfig as QueryHeadJumpReLUTrainingSAEConfig,
)
from .sae import (
    QueryHeadKLSparseTrainingSAEConfig as QueryHeadKLSparseTrainingSAEConfig,
)
from .sae import (
    QueryHeadMatryoshkaBatchTopKTrainingSAEConfig as QueryHeadMatryoshkaBatchTopKTrainingSAEConfig,
)
from .sae import (
    QueryHeadSAE as QueryHeadSAE,
)
from .sae import (
    QueryHeadStandardTrainingSAEConfig as QueryHeadStandardTrainingSAEConfig,
)
from .sae import (
    QueryHeadTopKTrainingSAEConfig as QueryHeadTopKTrainingSAEConfig,
)
from .sae.collection import QuerySAEs as QuerySAEs
from .sae.encoders import (
    IdentityEncoder as IdentityEncoder,
)
from .sae.encoders import (
    QueryEncoder as QueryEncoder,
)
from .sae.encoders import (
    identity_encoders as identity_encoders,
)
from .sae.heads import join_heads as join_heads
from .sae.heads import split_heads as split_heads
from .scopes.joins import AllOf as AllOf
from .scopes.joins import AnyOf as AnyOf
from .scopes.joins import Not as Not
from .scopes.marked import AfterToken as AfterToken
from .scopes.marked import AtPositions as AtPositions
from .scopes.marked import RowMask as RowMask
from .scopes.named import EveryPosition as EveryPosition
from .scopes.named import FirstResponseTokens as FirstResponseTokens
from .scopes.named import LastPromptToken as LastPromptToken
from .scopes.named import LastPromptTokens as LastPromptTokens
from .scopes.named import LastResponseToken as LastResponseToken
from .scopes.named import PromptTokens as PromptTokens
from .scopes.named import ResponseTokens as ResponseTokens
from .scopes.named import Window as Window
from .scopes.named import WindowAroundPromptEnd as WindowAroundPromptEnd
from .scopes.positions import Positions as Positions
from .sites import QuerySite as QuerySite
from .sites import query_sites as query_sites
from .steering.attach import attached_saes as attached_saes
from .steering.files import load_steerer as load_steerer
from .steering.files import save_steerer as save_steerer
from .steering.joined import JoinedSteerers as JoinedSteerers
from .steering.latent_descent import LatentGradientSteerer as LatentGradientSteerer
from .steering.partial import partial_steerer as partial_steerer
from .steering.trace import SteeringTrace as SteeringTrace
from .targets.builder import CentroidTargetBuilder as CentroidTargetBuilder
from .targets.centroids import CentroidTargets as CentroidTargets
from .toy.pretrained import load_tutor as load_tutor
from .training.distributed import train_on_ranks as train_on_ranks
from .training.train import train_query_saes as train_query_saes
