"""The recipe: its schema, how it is read, and the rules that span its sections."""

from peftkit.recipe.load import LoadedRecipe, load_recipe
from peftkit.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "load_recipe"]
