"""The residual stream of a transformer, and what is exact because its norms take the mean away."""
