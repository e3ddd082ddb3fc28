"""A plan carried out: kernels factorized, chains written in the place of layers, fitted in sequence, biases corrected."""
