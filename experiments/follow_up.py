"""The descent of arXiv 2605.23040, which steers grid planning, as far as it is known."""

import sae_query_steer as sqs
from sae_query_steer.compare.methods import Descent

FOLLOW_UP = Descent(
    name="log softmax of squared distances",
    objective=sqs.PrototypeLogLikelihood(temperature=0.5),
    n_steps=20,
    step_sizes=(0.5, 0.65, 0.8),
)
"""With ReLU SAEs with an L1 penalty and decoder rows of norm 1 at one middle layer. These settings
are known second-hand, the number of steps is our choice, and the full text was not read."""
