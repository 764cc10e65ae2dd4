"""Recipes: the architecture of a converted model as a file, to make it again before weights are loaded."""

from .saving import apply_recipe as apply_recipe
from .saving import recipe_of as recipe_of
from .saving import save_recipe as save_recipe
