"""How several processes work as one: the launcher, collectives, and the ways to split a model and its training."""
