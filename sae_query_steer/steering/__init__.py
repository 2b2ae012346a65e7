"""From centroids to text: the steerer in the model, and the trace of what it did."""
