"""Converting the norms of an existing model."""

from .apply import convert as convert
