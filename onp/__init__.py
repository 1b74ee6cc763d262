"""Optimized Neuron Pruning (ONP, arXiv 2405.17746): remove a backdoor from a network with clean images alone."""
