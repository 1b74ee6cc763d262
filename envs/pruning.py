"""The pruning environment: Gymnasium's interface around a network, its unit graph and clean data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch_geometric.data import Data

from envs.actions import ActionSet
from envs.rewards import Objective, Term
from onp.checks import check_network
from onp.clues import Clues, find_clues
from onp.config import EnvConfig
from onp.data import DefenceData
from onp.engine import ActivationCache
from onp.errors import ConfigError, MaskError
from onp.graph import build_graph
from onp.journal import Journal
from onp.masks import KeepMask
from onp.units import UnitIndex, index_units

Observation = dict[str, np.ndarray]
LIMIT = 1e6  # of observations, in potential; no sane network comes near


class PruningEnv(gym.Env[Observation, np.int64]):
    """Prune a network that may carry a backdoor: a unit a step, or the best units of a layer at once; and undo it.

    The environment is built from a network and clean labelled images alone; it has no place for a trigger.

    ## Action space
    `Discrete(N + B + 1)`, see `envs.actions.ActionSet`: action i < N prunes unit i of the index, or restores it where
    it is pruned; each of the B bulk actions prunes the units of one layer that are estimated best
    (`env.unwrapped.actions.bulks` has layers and counts); the last action stops. With `prune_groups` every unit tied to
    a pruned or restored one goes with it. An invalid action (one that would undo the last, a bulk of more units than
    the layer still has, a number out of range) is a no-op with reward 0 that costs a step and is counted in
    `info["invalid_actions"]`; it never raises. A step behind the end of an episode does (`ResetNeeded`).

    ## Observation space
    `Dict`, only what changes; what does not change (node features, edges) is `env.unwrapped.graph`, a PyG `Data`.

    | key           | space                | meaning                                                             |
    |---------------|----------------------|---------------------------------------------------------------------|
    | `kept`        | `MultiBinary(N)`     | 1 where a unit is kept                                              |
    | `action_mask` | `MultiBinary(N+B+1)` | 1 where an action is valid; stopping always is                      |
    | `effects`     | `Box(N + B)`         | estimated change of the potential by the action (see below)         |
    | `progress`    | `Box(2)`             | fraction of the steps that is left; potential gained since the start |

    Effects are estimated at the episode's best mask so far, and it is by those that a bulk chooses its units. So a step
    that gains nothing costs one reward evaluation and not two; where the current mask is not the best, they are hints,
    with the sign changed for units that only one of the two keeps.

    ## Reward
    The change of the potential, a weighted sum of the terms in `envs.rewards` (weights: `EnvConfig.reward`) and of
    `own_terms`, so that the return of any prefix of an episode is the worth of its mask.

    ## Start
    Every unit is kept, or those of `reset(options={"keep_mask": mask})`. `reset(seed=...)` is accepted; nothing in the
    environment is random.

    ## End
    `terminated` after the stop action, or when `max_steps` steps (no-ops included) have passed: the observation shows
    the steps left, so the limit is part of the task and `truncated` is always False.

    ## Info
    `terms` (unweighted value of every reward term), `potential`, `units_pruned` (units, not actions),
    `invalid_actions` (this episode), `reward_evaluations` (distinct masks scored since construction, sensitivity
    passes included), `keep_mask` (the `KeepMask`, a copy).

    ## Render
    With `render_mode="ansi"`, `render()` gives the step, the potential and its terms, and which layers lost units.

    ## Arguments
    `model`: the network, giving logits (a copy of it is pruned: `model` stays as it is, and changes to it later on are
    not seen); `data`: the clean images to score masks on; `config`: see `EnvConfig`;
    `clues`: what the reward needs besides (made from the network and `data` when None, with `seed`); `index`: the
    network's units and `cache`: memory for activations (made when None; several environments may share them);
    `journal`: what was computed before a kill (nothing when None); `own_terms`: further reward terms by name, each a
    weight and a function of `envs.rewards.Outputs` (effects, the observed ones too, do not count them);
    `render_mode`: None or "ansi". Raises `ConfigError` for other modes and terms, and what `check_network` does.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 (Gymnasium's convention)

    def __init__(
        self,
        model: nn.Module,
        data: DefenceData,
        config: EnvConfig | None = None,
        clues: Clues | None = None,
        seed: int = 0,
        index: UnitIndex | None = None,
        cache: ActivationCache | None = None,
        journal: Journal | None = None,
        own_terms: Mapping[str, tuple[float, Term]] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, "ansi"):
            raise ConfigError(f"render_mode {render_mode!r}: expected None or 'ansi'")
        self.render_mode = render_mode
        self.config = config or EnvConfig()
        self.index = index or index_units(model, data.input_shape)
        model = copy.deepcopy(model).eval()
        data = check_network(model, data)
        clues = clues or find_clues(model, data, self.config, seed)
        self.cache = cache or ActivationCache.of_gib(self.config.cache_gib)
        self.objective = Objective(
            model,
            clues,
            self.index,
            data,
            self.config.reward,
            self.config.effect_images,
            self.cache,
            journal,
            own_terms,
        )
        self.effects = {
            **self.objective.effects(self.objective.all_kept),
            "clean_loss": self.objective.engines["pruned"].effects(self.objective.all_kept, data.cross_entropy).sum(0),
        }
        self.objective.evaluations += 1  # that was a sensitivity pass too
        self.graph: Data = build_graph(self.index, model, data.inputs, clues.unlearned, self.effects)
        self.actions = ActionSet(self.index, self.config.bulk_fractions, self.config.prune_groups)
        self.graph.bulk_layer = torch.tensor([bulk.layer for bulk in self.actions.bulks], dtype=torch.long)
        self.graph.bulk_count = torch.tensor([float(bulk.count) for bulk in self.actions.bulks])
        units, choices = len(self.index), len(self.actions)
        self.observation_space: spaces.Space[Observation] = spaces.Dict(  # type: ignore[assignment]
            {
                "kept": spaces.MultiBinary(units),
                "action_mask": spaces.MultiBinary(choices),
                "effects": spaces.Box(-LIMIT, LIMIT, (choices - 1,), np.float32),
                "progress": spaces.Box(-LIMIT, LIMIT, (2,), np.float32),
            }
        )
        self.action_space = spaces.Discrete(choices)
        self._begin(self.objective.all_kept)

    @property
    def reward_evaluations(self) -> int:
        return self.objective.evaluations

    def twin(self) -> PruningEnv:
        """Another environment over the same network, with episodes of its own.

        Scores, effects and `reward_evaluations` are shared, so several twins in a vectorised environment
        (`DummyVecEnv([env.twin] * 4)`) never pay twice for a mask. (`copy.copy(env)` is another that goes on from where
        this one's episode is, for search in trees.)
        """
        twin = copy.copy(self)
        twin.action_space = copy.deepcopy(self.action_space)  # it draws by a seed of its own
        twin.reset()
        return twin

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Keep every unit again, or those of the `KeepMask` in `options={"keep_mask": mask}`.

        Raises `MaskError` where that is none of this network's, or of another rule than "zero", and for other options.
        """
        super().reset(seed=seed)
        if unknown := set(options or {}) - {"keep_mask"}:
            raise MaskError(f"options {sorted(unknown)}: expected 'keep_mask' alone")
        mask = (options or {}).get("keep_mask", self.objective.all_kept)
        if not isinstance(mask, KeepMask):
            raise MaskError(f"options['keep_mask'] is a {type(mask).__name__}; a KeepMask is expected")
        if mask.rule != "zero":
            raise MaskError(f"options['keep_mask'] is of rule {mask.rule!r}; the environment prunes by rule 'zero'")
        mask.check_fits(self.index)
        self._begin(mask.copied())
        return self._observation(), self._info()

    def _begin(self, mask: KeepMask) -> None:
        self.mask = self.best = mask
        self.initial_score = self.score = self.objective.score(mask)
        self.steps = self.invalid_actions = 0
        self.terminated = False
        self._undoing: list[int] = []

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Prune, restore or stop; see the class docstring. Raises `ResetNeeded` where the episode has ended."""
        if self.terminated:
            raise gym.error.ResetNeeded("the episode has ended; call reset() before the next step()")
        action = int(action)
        before = self.score.potential
        self.steps += 1
        stopped = action == self.actions.stop
        if not stopped and 0 <= action < len(self.actions) and bool(self._valid()[action]):
            self._undoing = self.actions.undoing(action)
            self.mask = self.actions.after(action, self.mask, self._effects())
            self.score = self.objective.score(self.mask)
            if self.score.potential > self.objective.score(self.best).potential:
                self.best = self.mask
        elif not stopped:
            self.invalid_actions += 1
        self.terminated = stopped or self.steps >= self.config.max_steps
        return self._observation(), self.score.potential - before, self.terminated, False, self._info()

    def render(self) -> str | None:
        """The episode in words, with `render_mode="ansi"`; else None."""
        if self.render_mode is None:
            return None
        layers = [(layer.name, self.mask.keep[layer.offset : layer.offset + layer.size]) for layer in self.index]
        pruned = [f"  {name}: {int((~kept).sum())} of {len(kept)}" for name, kept in layers if not bool(kept.all())]
        terms = ", ".join(f"{name} {value:.4f}" for name, value in self.score.terms.items())
        return "\n".join(
            [
                f"step {self.steps} of {self.config.max_steps}{', the end' * self.terminated}",
                f"potential {self.score.potential:.4f} ({self.score.potential - self.initial_score.potential:+.4f})",
                f"  {terms}",
                f"units pruned: {self.mask.units_pruned}",
                *pruned,
            ]
        )

    def close(self) -> None:
        """Give up the activations that are kept between masks; twins share them, and compute them again."""
        self.cache.clear()

    def action_masks(self) -> np.ndarray:
        """Which actions are valid, (N + B + 1,) bool: what sb3-contrib's MaskablePPO asks for."""
        return self._valid().numpy()

    def _valid(self) -> Tensor:
        valid = self.actions.valid(self.mask)
        valid[self._undoing] = False
        return valid

    def _effects(self) -> Tensor:
        """Those at the best mask so far, (N,), with the sign changed where the current mask has a unit otherwise."""
        effects = self.objective.effects(self.best)["score"]
        return torch.where(self.mask.keep == self.best.keep, effects, -effects)

    def _observation(self) -> Observation:
        left = 1 - self.steps / self.config.max_steps
        gained = self.score.potential - self.initial_score.potential
        effects = self.actions.totals(self.mask, self._effects())
        return {
            "kept": self.mask.keep.numpy().astype(np.int8),
            "action_mask": self._valid().numpy().astype(np.int8),
            "effects": effects.clamp(-LIMIT, LIMIT).numpy(),
            "progress": np.array([left, np.clip(gained, -LIMIT, LIMIT)], dtype=np.float32),
        }

    def _info(self) -> dict[str, Any]:
        return {
            "terms": dict(self.score.terms),
            "potential": self.score.potential,
            "units_pruned": self.mask.units_pruned,
            "invalid_actions": self.invalid_actions,
            "reward_evaluations": self.reward_evaluations,
            "keep_mask": self.mask.copied(),
        }
