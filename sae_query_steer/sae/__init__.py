"""SAEs of query heads: all heads of one layer in one SAELens object.

Importing this package registers its architectures with SAELens, so that `SAE.load_from_disk`
and SAELens's runners know them.
"""

from sae_query_steer.sae.batchtopk import (
    QueryHeadBatchTopKTrainingSAE,
    QueryHeadBatchTopKTrainingSAEConfig,
)
from sae_query_steer.sae.core import (
    QueryHeadSAE,
    QueryHeadSAEConfig,
    QueryHeadTrainingSAE,
    QueryHeadTrainingSAEConfig,
)
from sae_query_steer.sae.gated import (
    QueryHeadGatedSAE,
    QueryHeadGatedSAEConfig,
    QueryHeadGatedTrainingSAE,
    QueryHeadGatedTrainingSAEConfig,
)
from sae_query_steer.sae.inference import to_inference
from sae_query_steer.sae.jumprelu import (
    QueryHeadJumpReLUSAE,
    QueryHeadJumpReLUSAEConfig,
    QueryHeadJumpReLUTrainingSAE,
    QueryHeadJumpReLUTrainingSAEConfig,
)
from sae_query_steer.sae.kl_sparse import (
    QueryHeadKLSparseSAE,
    QueryHeadKLSparseSAEConfig,
    QueryHeadKLSparseTrainingSAE,
    QueryHeadKLSparseTrainingSAEConfig,
)
from sae_query_steer.sae.matryoshka import (
    QueryHeadMatryoshkaBatchTopKTrainingSAE,
    QueryHeadMatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_query_steer.sae.standard import (
    QueryHeadStandardSAE,
    QueryHeadStandardSAEConfig,
    QueryHeadStandardTrainingSAE,
    QueryHeadStandardTrainingSAEConfig,
)
from sae_query_steer.sae.topk import (
    QueryHeadTopKSAE,
    QueryHeadTopKSAEConfig,
    QueryHeadTopKTrainingSAE,
    QueryHeadTopKTrainingSAEConfig,
)

__all__ = [
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
    "to_inference",
]
