"""Gymnasium environments for pruning a network, unit by unit.

Importing this package imports nothing heavy: Gymnasium calls `register_envs` by its entry point.
"""

from gymnasium.envs.registration import register


def register_envs() -> None:
    """Register `onp/NeuronPruning-v0` (the entry point supplies the namespace `onp`)."""
    register(id="NeuronPruning-v0", entry_point="envs.pruning:PruningEnv")
