"""Every setting, with its meaning: the commands expose these dataclasses as options and save them with the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Literal

from onp.errors import ConfigError


def require(config: Any, **least: float) -> None:
    """Raise `ConfigError` for the first setting of `config` that is below its least value, or no finite number."""
    for name, bound in least.items():
        if not bound <= (value := getattr(config, name)) < inf:
            raise ConfigError(f"{type(config).__name__}.{name} {value}: expected at least {bound}")


@dataclass(frozen=True)
class UnlearnConfig:
    """RNP's unlearning; the defaults are those of the reference implementation."""

    def __post_init__(self) -> None:  # single images are left out of training
        require(self, learning_rate=0, momentum=0, weight_decay=0, batch_size=2, max_epochs=1)

    learning_rate: float = 0.01
    """step size of SGD"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 5e-4
    """weight decay of SGD"""
    milestones: tuple[int, ...] = (10, 20)
    """epochs behind which the learning rate falls to a tenth"""
    batch_size: int = 128
    """images per step"""
    max_epochs: int = 21
    """epochs at the most"""
    stop_accuracy: float = 0.2
    """stop when the running accuracy is not above this fraction"""
    stop_on: Literal["epoch", "batch"] = "epoch"
    """what the running accuracy is taken over"""
    min_steps: int = 0
    """where the stop comes in fewer steps, all is done again at a third of the learning rate, five times at the most"""


@dataclass(frozen=True)
class TriggerRecoveryConfig:
    """Neural-Cleanse-style recovery of the trigger from clean images."""

    def __post_init__(self) -> None:
        require(self, steps=1, finalists=1, variants=1, starts=1, batch_size=1, learning_rate=0, size_weight=0)
        if not self.conclusive >= 0.8:
            raise ConfigError(f"conclusive {self.conclusive}: expected a probability of at least 0.8, or more than 1")

    steps: int = 100
    """Adam steps for all classes side by side, and again for the finalists"""
    finalists: int = 3
    """classes with the smallest masks that are optimised for longer"""
    variants: int = 3
    """masks of the suspect class at the most, on pixels that differ; with more than one, a faint pattern too"""
    starts: int = 6
    """random starts of the search for a trigger without a target"""
    learning_rate: float = 0.4
    """step size of Adam, on the logits of mask and pattern"""
    batch_size: int = 16
    """images per class and step"""
    size_weight: float = 1e-3
    """first weight of a mask's size; raised by half whenever success passes 98 %, lowered below 95 %"""
    conclusive: float = 0.95
    """probability of a backdoor by the masks of classes alone, from which triggers of other families are not looked
    for; above 1 they always are"""


@dataclass(frozen=True)
class WarpRecoveryConfig:
    """Recovery of a smooth warp from clean images."""

    def __post_init__(self) -> None:
        require(self, steps=1, finalists=1, grid=1, batch_size=1, learning_rate=0, size_weight=0)

    steps: int = 60
    """Adam steps for all classes side by side, and again for the finalists"""
    finalists: int = 3
    """classes with the smallest warps that are optimised for longer"""
    grid: int = 4
    """displacements per side that the warp is interpolated from"""
    learning_rate: float = 0.3
    """step size of Adam, in 32ths of the image's height"""
    batch_size: int = 16
    """images per class and step"""
    size_weight: float = 0.02
    """first weight of a warp's size; raised by half whenever success passes 90 %, lowered below 80 %"""


@dataclass(frozen=True)
class WaveRecoveryConfig:
    """Recovery of a wave, a pattern of few frequencies, from clean images."""

    def __post_init__(self) -> None:
        require(self, steps=1, classes=2, finalists=1, batch_size=1, learning_rate=0, first_amplitude=0, size_weight=0)

    steps: int = 100
    """Adam steps for all classes side by side, and again for the finalists"""
    classes: int = 10
    """classes that a wave is looked for: those that the unlearned copy answers most"""
    finalists: int = 3
    """classes with the smallest waves that are optimised for longer"""
    learning_rate: float = 0.05
    """step size of Adam"""
    batch_size: int = 16
    """images per class and step"""
    first_amplitude: float = 0.6
    """amplitude of every frequency at first"""
    size_weight: float = 0.01
    """first weight of a wave's size; raised by half whenever success passes 98 %, lowered below 95 %"""


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward terms (`envs.rewards`): the potential is their weighted sum."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isfinite(value):
                raise ConfigError(f"reward weight {name} {value}: expected a finite number")

    clean_accuracy: float = 1.0
    """weight of clean accuracy, per accuracy fraction"""
    clean_fidelity: float = 12.0
    """weight of minus the KL divergence of clean outputs from the original's, per nat"""
    unlearning: float = 1.5
    """weight of minus the log cross-entropy of the unlearned copy under the same mask; a tenth counts where the
    recovered trigger can be trusted"""
    trigger_resistance: float = 0.3
    """weight of minus the log-odds of the recovered trigger's success, times the trust in it"""


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Looking for a backdoor: what is made from clean images to tell."""

    unlearn: UnlearnConfig = field(
        default_factory=lambda: UnlearnConfig(stop_on="batch", max_epochs=60, milestones=(), min_steps=30)
    )
    """how the unlearned copy is made; it stops at the first batch, where the backdoor is still alive"""
    recovery: TriggerRecoveryConfig = field(default_factory=lambda: TriggerRecoveryConfig(variants=1))
    """how a mask and a pattern are recovered for every class"""
    warp: WarpRecoveryConfig = field(default_factory=WarpRecoveryConfig)
    """how a warp is recovered for every class"""
    wave: WaveRecoveryConfig = field(default_factory=WaveRecoveryConfig)
    """how a wave is recovered"""


@dataclass(frozen=True, kw_only=True)
class EnvConfig(DetectionConfig):
    """The pruning environment; what its reward goes by is looked for as a backdoor is."""

    def __post_init__(self) -> None:
        require(self, max_steps=1, effect_images=1, cache_gib=0)
        if not all(0 < fraction < 1 for fraction in self.bulk_fractions):
            raise ConfigError(f"bulk_fractions {self.bulk_fractions}: expected fractions between 0 and 1")

    max_steps: int = 16
    """steps an episode lasts at the most"""
    bulk_fractions: tuple[float, ...] = (1 / 64, 1 / 16)
    """parts of a layer that one action can prune at once, where they make two units or more"""
    prune_groups: bool = False
    """prune all units that a residual addition ties to the chosen one with it, as ONP describes; else single units"""
    effect_images: int = 100
    """images that the first-order effects in the observation are estimated on; they only have to rank units"""
    cache_gib: float = 4.0
    """activations kept between masks, GiB at the most"""
    reward: RewardConfig = field(default_factory=RewardConfig)
    recovery: TriggerRecoveryConfig = field(default_factory=TriggerRecoveryConfig)
    """how masks with patterns, and a faint pattern, are recovered"""


@dataclass(frozen=True)
class AgentConfig:
    """The GNN policy and PPO."""

    def __post_init__(self) -> None:
        for name in ("restart_fraction", "gamma", "gae_lambda", "clip_range"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name} {value}: expected a fraction from 0 to 1")
        require(self, elites=1, patience=1, steps_per_evaluation=1, heads=1, hidden=1, layers=0)
        require(self, n_steps=2, batch_size=2)  # PPO asks for two steps or more
        require(self, learning_rate=0, ent_coef=0, n_envs=1, n_epochs=1)
        if self.hidden % self.heads:
            raise ConfigError(f"hidden {self.hidden}: expected a multiple of heads ({self.heads})")

    hidden: int = 32
    """width of the node embeddings"""
    heads: int = 2
    """attention heads of each graph layer"""
    layers: int = 2
    """graph attention layers"""
    learning_rate: float = 2e-3
    """step size of Adam"""
    n_envs: int = 1
    """environments that advance together"""
    n_steps: int = 32
    """steps of each environment between two updates"""
    batch_size: int = 16
    """steps per gradient step"""
    n_epochs: int = 5
    """passes over the steps of an update"""
    gamma: float = 1.0
    """discount; 1, since an episode is short and its return is the potential gained"""
    gae_lambda: float = 0.95
    """bias-variance trade-off of the advantage estimate"""
    clip_range: float = 0.2
    """PPO's clipping range"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    restart_fraction: float = 0.8
    """fraction of the training episodes that begin along one of the best ones so far; 0 is plain PPO"""
    elites: int = 4
    """best episodes to begin from"""
    patience: int = 2
    """steps without a new best return that end a training episode"""
    steps_per_evaluation: int = 6
    """environment steps at the most per reward evaluation of the budget (masks seen before cost no evaluation)"""
