"""How a model is made to prefer: reward models, preference losses, and reinforcement learning on its own samples."""
