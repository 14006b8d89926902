"""How data sets become tasks: the protocols, their image lists and label views."""
