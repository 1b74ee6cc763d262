"""Agents for the pruning environment: a GNN policy trained with PPO, and the searches that keep it honest."""
