"""Which tokens: spans, where centroids are taken, and scopes, where a steer acts."""
