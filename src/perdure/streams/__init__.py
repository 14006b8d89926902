"""How data sets become tasks: protocols, image lists and label tables."""
