"""Grids and lists of recipes: trained with several seeds, judged alike, and laid out against what they cost."""
