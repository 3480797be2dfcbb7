"""The steps of the compiler: each takes the recipe, and what the steps before it made."""
