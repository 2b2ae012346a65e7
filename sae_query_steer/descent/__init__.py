"""Where to, and how far: objectives, and gradient descent on them, without a model."""
