"""PPO on the pruning environment, within a budget of reward evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.policy import GraphPolicy
from agents.restarts import ReturnToBest
from onp.config import AgentConfig
from onp.errors import ConfigError

Progress = Callable[[int, int], None]


@dataclass
class LearningCurve:
    """One entry per finished episode."""

    evaluations: list[int] = field(default_factory=list)
    """reward evaluations used by then"""
    returns: list[float] = field(default_factory=list)
    """potential gained in the episode"""


class BudgetCallback(BaseCallback):
    """Stops learning when the environment has used its reward evaluations, and records the learning curve."""

    def __init__(self, budget: int, progress: Progress) -> None:
        super().__init__()
        self.budget, self.progress = budget, progress
        self.curve = LearningCurve()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            used = info["reward_evaluations"]
            if "episode" in info:
                self.curve.evaluations.append(used)
                self.curve.returns.append(info.get("return", info["episode"]["r"]))
                self.logger.record_mean("pruning/units_pruned", info["units_pruned"])
                for name, value in info["terms"].items():
                    self.logger.record_mean(f"pruning/{name}", value)
            self.logger.record("pruning/reward_evaluations", used)
            self.progress(min(used, self.budget), self.budget)
        return all(info["reward_evaluations"] < self.budget for info in self.locals["infos"])


def build_agent(env: gym.Env[Any, Any], config: AgentConfig, seed: int, log_dir: Path | None = None) -> PPO:
    """A fresh PPO agent with a `GraphPolicy` over the environment's graph, on the CPU.

    It learns on episodes that may begin along the best ones so far; the returns recorded are those of whole episodes.
    With a `config.restart_fraction` of 0 it is plain PPO on the environment as it is.
    With `config.n_envs` above 1, twins of the environment advance together; raises `ConfigError` where wrappers of the
    user's, which those would lack, lie around it.
    """
    if config.n_envs > 1 and (wrappers := _own_wrappers(env)):
        raise ConfigError(
            f"n_envs {config.n_envs}: twins would lack the environment's wrappers ({', '.join(wrappers)}); use 1"
        )

    def training_env(number: int) -> gym.Env[Any, Any]:
        twin = env.unwrapped.twin() if number else env  # type: ignore[attr-defined]
        if config.restart_fraction > 0:
            twin = ReturnToBest(twin, config.restart_fraction, config.elites, config.patience, seed + number)
        return Monitor(twin)

    return PPO(
        GraphPolicy,
        DummyVecEnv([partial(training_env, number) for number in range(config.n_envs)]),
        learning_rate=config.learning_rate,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        policy_kwargs={"graph": env.unwrapped.graph, "config": config},  # type: ignore[attr-defined]
        tensorboard_log=str(log_dir) if log_dir else None,
        seed=seed,
        device="cpu",
    )


def _own_wrappers(env: gym.Env[Any, Any]) -> list[str]:
    """Names of what lies around an environment, but for what `gymnasium.make` puts there to check it."""
    names = []
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, gym.wrappers.OrderEnforcing | gym.wrappers.PassiveEnvChecker):
            names.append(type(env).__name__)
        env = env.env
    return names


def train_agent(agent: PPO, config: AgentConfig, budget: int, progress: Progress) -> LearningCurve:
    """Learn until the environment has used `budget` reward evaluations."""
    callback = BudgetCallback(budget, progress)
    agent.learn(budget * config.steps_per_evaluation, callback=callback, tb_log_name="ppo")
    return callback.curve


def roll_out(agent: PPO, env: gym.Env[Any, Any], budget: float = float("inf")) -> float:
    """One episode of the deterministic policy, while the budget lasts; returns the potential gained."""
    observation, info = env.reset()
    done, total = False, 0.0
    while not done and info["reward_evaluations"] < budget - 1:  # a step costs a mask and perhaps a sensitivity pass
        with torch.no_grad():
            action, _ = agent.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, info = env.step(action)
        done, total = terminated or truncated, total + float(reward)
    return total
