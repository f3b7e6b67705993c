"""How a model learns: objectives, schedules, optimizers and the loop around them."""
