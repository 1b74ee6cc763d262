"""Gymnasium environments for pruning a network, unit by unit.

Importing this package registers `onp/NeuronPruning-v0` and imports nothing heavy: the environment's own module is
loaded when it is first made. (Gymnasium 1.x has no plug-in loader, so one import, of `envs` or `onp`, is needed.)
"""

from gymnasium.envs.registration import register

register(id="onp/NeuronPruning-v0", entry_point="envs.pruning:PruningEnv")
