"""The recipe's schema: typed sections, and how a recipe file becomes the recipe of every run."""
