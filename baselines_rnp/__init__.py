"""Reconstructive Neuron Pruning (Li et al., ICML 2023, arXiv 2305.14876): unlearn, recover, prune."""
