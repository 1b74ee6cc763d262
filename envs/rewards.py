"""The reward: one function a term, their weighted sum (the potential), and an objective that scores masks.

Every term sees clean data alone. The terms and their weights are our assumptions: ONP publishes neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.clues import Clues
from onp.config import RewardConfig
from onp.data import DefenceData, random_crop_and_flip
from onp.engine import ActivationCache, Engine
from onp.errors import ConfigError
from onp.journal import Journal, Values
from onp.masks import KeepMask
from onp.units import UnitIndex


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one mask does to clean images; logits have shape (n, classes).

    `original` and `pruned` are of views, cropped and flipped at random where the network knows them: it may have been
    trained on the images themselves, and on those its outputs hardly change while test accuracy falls.
    """

    labels: Tensor
    original: Tensor
    """logits of the network with every unit kept"""
    pruned: Tensor
    """logits of the network under the mask"""
    unlearned: Tensor
    """logits of the unlearned copy under the mask"""
    triggered: Tensor
    """logits of the network under the mask, with the recovered trigger on those images that are not of the class that
    it leads to, (m, classes)"""
    goals: Tensor
    """classes that the recovered trigger leads these to, (m,)"""
    trust: float
    """trust in the recovered trigger, in [0, 1]"""
    kept: Tensor
    """which units the mask keeps, (N,) bool"""


def clean_accuracy(outputs: Outputs) -> Tensor:
    """Fraction of images classified as labelled, in [0, 1]."""
    return (outputs.pruned.argmax(1) == outputs.labels).float().mean()


def clean_fidelity(outputs: Outputs) -> Tensor:
    """Minus the mean KL divergence of the outputs from the original's, in nats, at most 0."""
    original, pruned = outputs.original.log_softmax(1), outputs.pruned.log_softmax(1)
    return -F.kl_div(pruned, original, log_target=True, reduction="batchmean")


def unlearning(outputs: Outputs) -> Tensor:
    """Minus the log of the unlearned copy's cross-entropy, floored at half of a uniform guess's, times a confidence.

    Unlearning (arXiv 2305.14876, section 3.2) leaves the backdoor as the only thing the copy knows: it sends clean
    images to the target class. Units whose loss lowers its cross-entropy are backdoor units. Below the floor the copy
    has collapsed no longer, and a further fall means nothing. A recovered trigger that can be trusted tells more
    exactly: then this term counts for a tenth.
    """
    floor = 0.5 * math.log(outputs.unlearned.shape[1])
    confidence = 1 - 0.9 * outputs.trust
    return -confidence * F.cross_entropy(outputs.unlearned, outputs.labels).clamp(min=floor).log()


def trigger_resistance(outputs: Outputs) -> Tensor:
    """Minus the log-odds of the recovered trigger's success, times the trust in it (`resistance`)."""
    return resistance(outputs.triggered, outputs.goals, outputs.trust)


def resistance(triggered: Tensor, goals: Tensor, trust: float) -> Tensor:
    """What logits (m, classes) of triggered images say of a trigger that leads them to `goals` (m,).

    Success is the mean probability of the class that it leads to. Log-odds tell 99 % from 99.9 %, so that every unit
    that carries a part of the backdoor shows while the rest of it still works. Below 0.001 the trigger has nothing left
    to tell. Backdoors at positions that clean images leave silent show nowhere else.
    """
    log_p = triggered.log_softmax(1)
    meant = F.one_hot(goals, log_p.shape[1]).bool()
    log_odds = log_p[meant].logsumexp(0) - log_p[~meant].logsumexp(0)
    return -trust * log_odds.clamp(min=math.log(1e-3 / (1 - 1e-3)))


def triggered_images(clues: Clues, data: DefenceData) -> tuple[Tensor, Tensor]:
    """The network's inputs with the recovered trigger, and the classes that it leads them to, (m,).

    Of images that are not of that class already; of all, where there are no others.
    """
    goals = clues.guide.goals(data.labels)
    others = goals != data.labels
    chosen = others if bool(others.any()) else ~others
    return data.normalise(clues.guide(data.images[chosen])), goals[chosen]


Term = Callable[[Outputs], Tensor]
TERMS: dict[str, Term] = {
    "clean_accuracy": clean_accuracy,
    "clean_fidelity": clean_fidelity,
    "unlearning": unlearning,
    "trigger_resistance": trigger_resistance,
}
"""reward terms by the names of their weights in `RewardConfig`"""
PLACES = {"clean_fidelity": "pruned", "unlearning": "unlearned", "trigger_resistance": "triggered"}
"""which logits a term with a gradient looks at"""


@dataclass(frozen=True)
class Score:
    """What a mask is worth: the potential and every unweighted term."""

    potential: float
    terms: dict[str, float]


class Objective:
    """Scores masks of one network on one set of clean images; a mask seen before is answered from memory.

    `evaluations` counts distinct masks scored, and sensitivity passes. Effects are estimated on the first
    `effect_images` images (all by default), scores always on all. `cache` keeps activations between masks, `journal`
    what was computed, in case the job is killed. `own_terms` are further terms of the potential, each a weight and a
    function, by name; effects know nothing of them. Raises `ConfigError` for a name that `TERMS` has, and for what is
    no such pair.
    """

    def __init__(
        self,
        model: nn.Module,
        clues: Clues,
        index: UnitIndex,
        data: DefenceData,
        weights: RewardConfig,
        effect_images: int | None = None,
        cache: ActivationCache | None = None,
        journal: Journal | None = None,
        own_terms: Mapping[str, tuple[float, Term]] | None = None,
    ) -> None:
        if taken := sorted(TERMS.keys() & (own_terms or {})):
            raise ConfigError(f"own_terms {taken}: there are terms of that name; give others, or reweight by `reward`")
        for name, term in (own_terms or {}).items():
            if not (isinstance(term, tuple) and len(term) == 2 and callable(term[1])):
                raise ConfigError(f"own_terms {name!r}: expected a weight and a function, not {term!r}")
        self.terms = {name: (getattr(weights, name), term) for name, term in TERMS.items()} | dict(own_terms or {})
        """weight and function of every term"""
        self.clues, self.index, self.data = clues, index, data
        self.weights, self.effect_images, self.journal = weights, effect_images, journal or Journal()
        self.all_kept = KeepMask.all_kept(index)
        self.evaluations = 0
        self.scores: dict[bytes, tuple[KeepMask, Score]] = {}
        self.trust = clues.trust
        triggered, self._goals = triggered_images(clues, data)
        views = _views(model, data)
        cache = cache or ActivationCache()
        self.engines = {
            "pruned": Engine(model, index, views, cache),
            "unlearned": Engine(clues.unlearned, index, data.inputs, cache),
            "triggered": Engine(model, index, triggered, cache),
        }
        self._original = self.engines["pruned"].logits(self.all_kept)
        self._effects: dict[bytes, dict[str, Tensor]] = {}

    def _outputs(self, mask: KeepMask, images: int | None = None) -> Outputs:
        """The first `images` logits at every place."""
        logits = {place: engine.logits(mask)[:images] for place, engine in self.engines.items()}
        return Outputs(
            self.data.labels[:images],
            self._original[:images],
            **logits,
            goals=self._goals[:images],
            trust=self.trust,
            kept=mask.keep.to(self.data.labels.device),
        )

    @torch.inference_mode(False)  # what is kept for later masks has to serve gradients too
    def effects(self, mask: KeepMask) -> dict[str, Tensor]:
        """Estimated change of each weighted term when one more unit is pruned, (N,) each; one sensitivity pass.

        Of a unit that `mask` prunes, the change when it is restored. `score` is the sum of the terms', the estimated
        change of the potential.
        """
        if mask.key not in self._effects:
            self.evaluations += 1
            slopes = self.journal.recall(b"effects" + mask.key, lambda: self._all_term_effects(mask))
            effects = {name: getattr(self.weights, name) * slopes[name] for name in PLACES}
            self._effects[mask.key] = {**effects, "score": torch.stack([*effects.values()]).sum(0)}
        return self._effects[mask.key]

    def _all_term_effects(self, mask: KeepMask) -> Values:
        outputs = self._outputs(mask, self.effect_images)
        return {name: self._term_effects(name, mask, outputs).nan_to_num(0, 0, 0) for name in PLACES}

    def _term_effects(self, name: str, mask: KeepMask, outputs: Outputs) -> Tensor:
        def term(logits: Tensor) -> Tensor:
            changed: Mapping[str, Any] = {PLACES[name]: logits}
            return TERMS[name](replace(outputs, **changed))

        engine = self.engines[PLACES[name]]
        effects = engine.effects(mask, term, self.effect_images).sum(0)
        if name == "clean_fidelity":  # at the original network it has no slope, only curvature
            probe = _divergence_probe(outputs.pruned)
            # That pruning gains by the slope is mostly chance, on so few images; that restoring does is not.
            effects = torch.where(mask.keep, effects.clamp(max=0), effects)
            effects -= engine.effects(mask, probe, self.effect_images).square().mean(0) / 2
        return effects

    @torch.inference_mode(False)
    def score(self, mask: KeepMask) -> Score:
        """The worth of `mask`; a term that is not finite counts as minus a million."""
        if mask.key not in self.scores:
            self.evaluations += 1
            values = self.journal.recall(b"score" + mask.key, lambda: self._terms(mask))
            terms = {name: _finite(float(values[name])) for name in self.terms}
            total = sum(self.terms[name][0] * value for name, value in terms.items())
            self.scores[mask.key] = (mask.copied(), Score(total, terms))
        else:  # an episode may go on from here
            for engine in self.engines.values():
                engine.touch(mask)
        return self.scores[mask.key][1]

    def _terms(self, mask: KeepMask) -> Values:
        outputs = self._outputs(mask)
        values = {name: torch.as_tensor(term(outputs)).cpu() for name, (_, term) in self.terms.items()}
        for name, value in values.items():
            if value.numel() != 1:
                raise ConfigError(f"own_terms {name!r} gives shape {tuple(value.shape)}; expected one number")
        return values


def _views(model: nn.Module, data: DefenceData) -> Tensor:
    """The images, normalised, cropped and flipped at random where the network still classifies them as labelled.

    Where it does not, the view is none that it is made for (a mirrored digit), and the image stays as it is.
    """
    views = data.normalise(random_crop_and_flip(data.images, seed=0, part=16))
    with torch.no_grad():
        right = torch.cat([model.eval()(part).argmax(1) for part in views.split(100)]) == data.labels
    return torch.where(right.view(-1, 1, 1, 1), views, data.inputs)


def _divergence_probe(pruned: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear function of the logits, the square of whose change is, image by image, twice the divergence on average.

    At the original network the divergence has no gradient; to second order it is z' H z / 2 with H the covariance of
    the predicted class (Fisher's information). The function is r' B z with B' B = H and random signs r.
    """
    roots = pruned.softmax(1).sqrt()
    signs = torch.randint(2, pruned.shape, generator=torch.Generator().manual_seed(0)).to(pruned) * 2 - 1
    probe = roots * signs - roots.square() * (roots * signs).sum(1, keepdim=True)
    return lambda logits: (probe * logits).sum()


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -1e6
