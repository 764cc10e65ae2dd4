"""The commands about a model."""
