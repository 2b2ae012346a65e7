"""SAEs of query heads: all heads of a layer in one SAELens object.

Importing this package registers its architectures with SAELens.
"""

import sae_lens  # noqa: F401  (first: its import hook imports this package, never half of it)

from sae_query_steer.config import (
    BatchTopK,
    Gated,
    JumpReLU,
    KLSparse,
    MatryoshkaBatchTopK,
    Standard,
    TopK,
)
from sae_query_steer.sae.batchtopk import QueryHeadBatchTopKTrainingSAE
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.configs import (
    QueryHeadBatchTopKTrainingSAEConfig,
    QueryHeadGatedSAEConfig,
    QueryHeadGatedTrainingSAEConfig,
    QueryHeadJumpReLUSAEConfig,
    QueryHeadJumpReLUTrainingSAEConfig,
    QueryHeadKLSparseSAEConfig,
    QueryHeadKLSparseTrainingSAEConfig,
    QueryHeadMatryoshkaBatchTopKTrainingSAEConfig,
    QueryHeadSAEConfig,
    QueryHeadStandardSAEConfig,
    QueryHeadStandardTrainingSAEConfig,
    QueryHeadTopKSAEConfig,
    QueryHeadTopKTrainingSAEConfig,
    QueryHeadTrainingSAEConfig,
    training_config,
)
from sae_query_steer.sae.core import QueryHeadSAE, QueryHeadTrainingSAE
from sae_query_steer.sae.encoders import IdentityEncoder, QueryEncoder, identity_encoders
from sae_query_steer.sae.gated import QueryHeadGatedSAE, QueryHeadGatedTrainingSAE
from sae_query_steer.sae.heads import join_heads, split_heads
from sae_query_steer.sae.inference import to_inference
from sae_query_steer.sae.jumprelu import QueryHeadJumpReLUSAE, QueryHeadJumpReLUTrainingSAE
from sae_query_steer.sae.kl_sparse import QueryHeadKLSparseSAE, QueryHeadKLSparseTrainingSAE
from sae_query_steer.sae.matryoshka import QueryHeadMatryoshkaBatchTopKTrainingSAE
from sae_query_steer.sae.standard import QueryHeadStandardSAE, QueryHeadStandardTrainingSAE
from sae_query_steer.sae.topk import QueryHeadTopKSAE, QueryHeadTopKTrainingSAE

__all__ = [
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "KLSparse",
    "MatryoshkaBatchTopK",
    "Standard",
    "TopK",
    "IdentityEncoder",
    "QueryEncoder",
    "QueryHeadBatchTopKTrainingSAE",
    "QueryHeadBatchTopKTrainingSAEConfig",
    "QueryHeadGatedSAE",
    "QueryHeadGatedSAEConfig",
    "QueryHeadGatedTrainingSAE",
    "QueryHeadGatedTrainingSAEConfig",
    "QueryHeadJumpReLUSAE",
    "QueryHeadJumpReLUSAEConfig",
    "QueryHeadJumpReLUTrainingSAE",
    "QueryHeadJumpReLUTrainingSAEConfig",
    "QueryHeadKLSparseSAE",
    "QueryHeadKLSparseSAEConfig",
    "QueryHeadKLSparseTrainingSAE",
    "QueryHeadKLSparseTrainingSAEConfig",
    "QueryHeadMatryoshkaBatchTopKTrainingSAE",
    "QueryHeadMatryoshkaBatchTopKTrainingSAEConfig",
    "QueryHeadSAE",
    "QueryHeadSAEConfig",
    "QueryHeadStandardSAE",
    "QueryHeadStandardSAEConfig",
    "QueryHeadStandardTrainingSAE",
    "QueryHeadStandardTrainingSAEConfig",
    "QueryHeadTopKSAE",
    "QueryHeadTopKSAEConfig",
    "QueryHeadTopKTrainingSAE",
    "QueryHeadTopKTrainingSAEConfig",
    "QueryHeadTrainingSAE",
    "QueryHeadTrainingSAEConfig",
    "QuerySAEs",
    "identity_encoders",
    "join_heads",
    "split_heads",
    "to_inference",
    "training_config",
]
