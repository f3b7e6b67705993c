"""Training a model further, with less memory than it took to train it: adapters, quantised weights, and the budget."""
