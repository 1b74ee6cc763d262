"""The evaluation engine: what networks say about fixed images, mask after mask, computing only what a mask changes.

A node of a network depends on the gates upstream of it alone, so its value is kept under the units pruned there and
serves every mask that agrees on those. Where a few gates reach a convolution channel by channel, linearity leaves only
their channels to compute: conv(x) = conv(x with these gates open) + conv(the difference in their channels). Which form
is taken depends on the mask alone, and images go through in fixed chunks, so a mask's logits never depend on what was
asked before. docs/engine.md has the cost model.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from onp.errors import ModelError
from onp.gated_network import GatedNetwork
from onp.masks import KeepMask, Rule
from onp.tracing import image_axis
from onp.units import UnitIndex

SPARSE = 32
"""a convolution is updated by channels where at most one in so many of its inputs has changed, or at most two"""

WORKSPACE = 256 << 20
"""bytes for the activations of the images that go through at a time"""

MASKS = 8
"""masks all of whose activations are kept at the most; more help little, and untouched memory is slow to come by"""

AJAR = 1e-12
"""how far closed gates stand open while the effect of opening them is estimated: behind a closed one a ReLU has no
slope and a maximum no place"""


class Wanted(NamedTuple):
    """One node's value under one mask: `pruned` holds no unit that the node does not depend on."""

    node: fx.Node
    pruned: frozenset[int]
    rule: Rule
    channels: tuple[int, ...] | None = None


class ActivationCache:
    """Activations under a bound of `max_bytes` together; the least recently used give way.

    The bound includes `workspace`, the bytes that the engines need besides while they compute, and leaves a fifth to
    the memory allocator, whose free blocks do not always fit.
    """

    def __init__(self, max_bytes: int = 4 << 30) -> None:
        self.max_bytes = max_bytes
        self.workspace = self.bytes = self.peak_bytes = 0
        self._entries: OrderedDict[Any, tuple[int, list[Any]]] = OrderedDict()
        self._one_mask: dict[object, int] = {}

    @classmethod
    def of_gib(cls, size: float) -> ActivationCache:
        """A cache of so many GiB."""
        return cls(int(size * 2**30))

    @property
    def _limit(self) -> float:
        return min(0.8 * self.max_bytes - self.workspace, MASKS * sum(self._one_mask.values()))

    def get(self, key: Any) -> list[Any] | None:
        """The value of `key`, chunk by chunk; None where it is not here."""
        return self._entries[key][1] if key in self._entries else None

    def touch(self, keys: Iterable[Any]) -> None:
        """Count `keys` as used just now."""
        for key in keys:
            if key in self._entries:
                self._entries.move_to_end(key)

    def register(self, owner: object, one_mask: int, workspace: int) -> None:
        """Expect keys (owner, ...): all of one mask's activations take `one_mask` bytes, computing them `workspace`."""
        self._one_mask[owner] = one_mask
        self.workspace = max(self.workspace, workspace)
        while self._entries and self.bytes > self._limit:
            self._drop(next(iter(self._entries)))

    def drop(self, owner: object) -> None:
        """Give up every key (owner, ...)."""
        self._one_mask.pop(owner, None)
        for key in [key for key in self._entries if key[0] is owner]:
            self._drop(key)

    def clear(self) -> None:
        """Give up every value."""
        self._entries.clear()
        self.bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without the values, which are computed again."""
        return {**self.__dict__, "_entries": OrderedDict(), "bytes": 0}

    def _drop(self, key: Any) -> None:
        self.bytes -= self._entries.pop(key)[0]

    def make_room(self, size: int, needed: set[Any]) -> bool:
        """Whether `size` bytes fit when all that is not `needed` may give way; what has to give way does."""
        if size + sum(self._entries[key][0] for key in needed) > self._limit:
            return False
        for key in [key for key in self._entries if key not in needed]:
            if self.bytes + size <= self._limit:
                break
            self._drop(key)
        return True

    def put(self, key: Any, size: int, value: list[Any]) -> None:
        """Keep a value for which room has been made."""
        self._entries[key] = (size, value)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes + self.workspace)


class Engine:
    """Logits of one network on one set of inputs, mask by mask, and first-order effects of toggling one unit more.

    `inputs` has shape (n, channels, height, width), already normalised. The engine works on a copy of the network in
    eval mode; several engines may share one `cache`. `chunk` images go through at a time, by default as many as
    `WORKSPACE` holds the activations of, but 100 at the most. Raises `ModelError` where the copy does not reproduce the
    network: its `forward` changes tensors in place that it uses again.
    """

    def __init__(
        self,
        model: nn.Module,
        index: UnitIndex,
        inputs: Tensor,
        cache: ActivationCache | None = None,
        chunk: int | None = None,
    ) -> None:
        self.inputs = inputs
        self.cache = cache if cache is not None else ActivationCache()
        self.network = GatedNetwork(model, index, tuple(inputs.shape[1:]), inputs.device)
        per_image = sum(map(self.network.bytes_per_image, self.network.nodes))
        chunk = chunk or min(max(WORKSPACE // per_image, 10), 100)
        self.one_mask = len(inputs) * sum(map(self.network.bytes_per_image, self.network.kept))
        """bytes of the activations worth keeping under one mask"""
        self._owner = object()  # of our keys in the cache
        # A pass for effects holds every activation of a chunk, and a gradient of each.
        self.cache.register(self._owner, self.one_mask, workspace=2 * chunk * per_image)
        self._chunks = [part.clone(memory_format=self.network.layout) for part in inputs.split(chunk)]
        weakref.finalize(self, self.cache.drop, self._owner)
        self._check(model)

    def _check(self, model: nn.Module) -> None:
        training = [module for module in model.modules() if module.training]
        with torch.no_grad():
            expected = model.eval()(self.inputs[:2].clone()).float()
        for module in training:
            module.training = True
        got, scale = self.logits(KeepMask.all_kept(self.network.index))[:2], expected.abs().nan_to_num(0, 0, 0).max()
        tolerance = 1e-2 if self.inputs.is_cuda else 1e-4  # cuDNN may convolve in TF32, with a mantissa of 10 bits
        if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(scale), equal_nan=True):
            raise ModelError(
                f"the traced copy of {type(model).__name__} gives other logits than the network itself; in forward(), "
                "assign the results of in-place operations, and leave out randomness and statistics of the batch"
            )

    def logits(self, mask: KeepMask) -> Tensor:
        """Logits under `mask`, shape (n, classes), float32, detached; raises `MaskError` for another network's mask."""
        mask.check_fits(self.network.index)
        output = self.network.output
        return torch.cat(self._values([output], mask, range(len(self._chunks)))[output]).float()

    def touch(self, mask: KeepMask) -> None:
        """Count what is kept of `mask` as used just now: masks like it are to be expected."""
        self.cache.touch(self._key(self._wanted(node, mask.pruned, mask.rule)) for node in self.network.nodes)

    def effects(self, mask: KeepMask, function: Callable[[Tensor], Tensor], images: int | None = None) -> Tensor:
        """First-order change of `function(logits)` when one unit more is pruned, by image: (n, N), on the CPU.

        Of a unit that `mask` prunes, the change when it is restored. The function sees the logits of the first n =
        `images` images (all by default); its change is the sum over them. Pruning multiplies a unit's output by 0, so
        the change is minus output times gradient (Molchanov et al. 2017), and the output it would have times gradient
        where it is restored. That is exact but where closed gates meet at a ReLU, as those of tied units do, or where a
        ReLU reads a convolution of closed gates alone, without a bias: then it is a guess, or 0.
        """
        logits = self.logits(mask)[:images].requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(function(logits), logits)
        recalled = list(self.network.parts)
        effects = slopes.new_zeros(len(slopes), len(mask.index))
        chunk = len(self._chunks[0])
        for i, (slope, part) in enumerate(zip(slopes.split(chunk), effects.split(chunk), strict=True)):
            known = self._values(recalled, mask, range(i, i + 1))
            images = len(self._chunks[i])  # of which a value may have several rows each
            cut = {node: value[: len(value) * len(slope) // images] for node, (value,) in known.items()}
            self._add_effects(part, cut, i, slope, mask)
        return effects.cpu()

    def _add_effects(
        self, effects: Tensor, known: dict[fx.Node, Tensor], i: int, slope: Tensor, mask: KeepMask
    ) -> None:
        network, values, gated = self.network, dict[fx.Node, Any](), list[tuple[fx.Node, Tensor, Tensor | None]]()
        with torch.enable_grad():
            for node in network.nodes[:-1]:
                if node in network.absorbed:
                    continue
                if (part := network.parts.get(node)) is not None:
                    other = values[part.other] if part.other else None
                    value = _Recalled.apply(known[node], part.module, values[part.source], other)
                else:
                    inputs = {source: values[source] for source in node.all_input_nodes}
                    value = network.run(node, inputs, mask.pruned, mask.rule) if inputs else self._source(node, i)
                    value = value[: len(slope)] if value is self._chunks[i] else value
                if node in network.layer_of:
                    opening = self._opening(node, values[node.all_input_nodes[0]], value, mask)
                    value = value if opening is None else value + AJAR * opening
                    # An alias of its own: an open gate hands on its input, which others may read too.
                    value = torch.ops.aten.alias(value) if value.requires_grad else value.detach().requires_grad_()
                    gated.append((node, value, opening))
                values[node] = value
            total = (values[network.output].float() * slope).sum()
        gradients = torch.autograd.grad(total, [value for _, value, _ in gated], allow_unused=True)
        for (node, value, opening), gradient in zip(gated, gradients, strict=True):
            if gradient is not None:
                layer, images = network.layer_of[node], image_axis(node)
                change = -value.detach() * gradient
                if opening is not None:
                    change = change * self._keep(node, value, mask) + opening * gradient
                if images is None:  # the same for all images, which share its change
                    change, images = change.unsqueeze(0).expand(len(slope), *change.shape) / len(slope), 0
                    change = change.movedim(network.axis(node) + 1, -1)
                else:
                    change = change.movedim((images, network.axis(node)), (0, -1))
                by_entry = change.reshape(len(slope), -1, layer.size * layer.width).sum(1)
                effects[:, layer.offset : layer.offset + layer.size] += by_entry.unflatten(1, (-1, layer.width)).sum(2)

    @torch.no_grad()
    def _opening(self, gate: fx.Node, source: Tensor, value: Tensor, mask: KeepMask) -> Tensor | None:
        """What is added to a gate's `value` where it is closed and opens, 0 where it is open; None where it all is."""
        if mask.pruned.isdisjoint(self.network.layer_of[gate].units):
            return None
        opened = self.network.run(gate, {gate.all_input_nodes[0]: source}, frozenset(), mask.rule)
        return (opened - value) * (1 - self._keep(gate, value, mask))

    def _keep(self, gate: fx.Node, value: Tensor, mask: KeepMask) -> Tensor:
        return self.network.along_axis(gate, self.network.keep(gate, mask.pruned, value), value)

    # --- values -------------------------------------------------------------------------------------------

    def _wanted(
        self, node: fx.Node, pruned: frozenset[int], rule: Rule, channels: tuple[int, ...] | None = None
    ) -> Wanted:
        relevant = pruned & self.network.upstream[node]
        return Wanted(node, relevant, rule if relevant else "zero", channels)

    def _values(self, nodes: list[fx.Node], mask: KeepMask, chunks: range) -> dict[fx.Node, list[Any]]:
        """The values of `nodes` on some chunks; those worth it are kept where all chunks are asked for."""
        wanted = [self._wanted(node, mask.pruned, mask.rule) for node in nodes]
        self.touch(mask)
        plan, known = self._plan(wanted)
        needed = {self._key(want) for want in known}
        keep: dict[Wanted, int] = {}
        for want in reversed(plan) if len(chunks) == len(self._chunks) else ():
            size = len(self.inputs) * self.network.bytes_per_image(want.node)
            lasting = want.channels is None and want.node in self.network.kept
            if lasting and self.cache.make_room(size + sum(keep.values()), needed):
                keep[want] = size
        found: dict[Wanted, list[Any]] = {want: [] for want in (*wanted, *keep)}
        uses = Counter(need for needs in plan.values() for need in needs)
        with torch.no_grad():
            for i in chunks:
                values: dict[Wanted, Any] = {}
                left = uses.copy()
                for want, needs in plan.items():
                    inputs = [known[need][i] if need in known else values[need] for need in needs]
                    last = (need for need in needs if left[need] == 1 and need in values and need not in found)
                    spare = next((need.node for need in last if self.network.fresh(need.node)), None)
                    values[want] = self._compute(want, inputs, i, spare)
                    if want in found:
                        found[want].append(values[want])
                    left.subtract(needs)
                    for need in needs:
                        if left[need] == 0 and need in values:
                            del values[need]
        for want, size in keep.items():
            self.cache.put(self._key(want), size, found[want])
        return {want.node: [known[want][i] for i in chunks] if want in known else found[want] for want in wanted}

    def _key(self, want: Wanted) -> tuple[Any, ...]:
        return self._owner, want.node.name, *want[1:]

    def _plan(self, wanted: list[Wanted]) -> tuple[dict[Wanted, list[Wanted]], dict[Wanted, list[Any]]]:
        """What has to be computed, in order, each with what it needs; and the values that are known already."""
        plan: dict[Wanted, list[Wanted]] = {}
        known: dict[Wanted, list[Any]] = {}
        stack: list[tuple[Wanted, list[Wanted] | None]] = [(want, None) for want in wanted]
        while stack:
            want, needs = stack.pop()
            if want in plan or want in known:
                continue
            if needs is not None:
                plan[want] = needs
            elif (value := self.cache.get(self._key(want))) is not None:
                known[want] = value
            else:
                needs = self._needs(want)
                stack.append((want, needs))
                stack += [(need, None) for need in needs]
        return plan, known

    def _needs(self, want: Wanted) -> list[Wanted]:
        node, pruned, rule, channels = want
        if channels is not None and self._cut(node):
            return [want._replace(channels=None)]
        if changed := self._changed(want):
            source = self.network.parts[node].source
            opened = pruned - self.network.local[source]
            return [
                self._wanted(node, opened, rule),
                self._wanted(source, pruned, rule, changed),
                self._wanted(source, opened, rule, changed),
            ]
        return [self._wanted(source, pruned, rule, channels) for source in node.all_input_nodes]

    def _cut(self, node: fx.Node) -> bool:
        """Whether some channels of a node's value are cut out of the whole, rather than computed alone."""
        return node in self.network.kept or node not in self.network.channelwise

    def _changed(self, want: Wanted) -> tuple[int, ...]:
        """Input channels by which a convolution (or its sum) is brought up to date; none where it is computed whole."""
        part = self.network.parts.get(want.node)
        if part is None or part.module.groups != 1:
            return ()
        closed = want.pruned & self.network.local[part.source]
        if part.other is not None and closed & self.network.upstream[part.other]:
            return ()
        channels = self.network.channels(closed)
        return channels if len(channels) <= max(2, part.module.in_channels // SPARSE) else ()

    def _compute(self, want: Wanted, inputs: list[Any], i: int, spare: fx.Node | None) -> Any:
        node, channels = want.node, None if want.channels is None else list(want.channels)
        if channels is not None and self._cut(node):
            return inputs[0][:, channels]
        if changed := self._changed(want):
            module = self.network.parts[node].module
            before, new, old = inputs
            weights = {"weight": module.weight[:, list(changed)]}
            if module.bias is not None:
                weights["bias"] = torch.zeros_like(module.bias)
            return functional_call(module, weights, (new - old,)).add_(before)
        if not inputs:
            return self._source(node, i)
        values = dict(zip(node.all_input_nodes, inputs, strict=True))
        return self.network.run(node, values, want.pruned, want.rule, channels, spare)

    def _source(self, node: fx.Node, i: int) -> Any:
        """The value of a node without inputs."""
        if node.op != "placeholder":
            return self.network.run(node, {}, frozenset(), "zero")
        return node.args[0] if node.args else self._chunks[i]  # other arguments have their defaults


class _Recalled(torch.autograd.Function):
    """A convolution, or its sum with another tensor, whose value is known: only the backward pass is left to do."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, module: Any, source: Tensor, other: Tensor | None) -> Tensor:
        ctx.save_for_backward(source)
        ctx.module = module
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        (source,), m = ctx.saved_tensors, ctx.module
        back: Tensor | None = None
        if ctx.needs_input_grad[2]:
            geometry = m.stride, m.padding, m.dilation, False, [0], m.groups
            wanted = [True, False, False]
            back = torch.ops.aten.convolution_backward(gradient, source, m.weight, None, *geometry, wanted)[0]
        return None, None, back, gradient if ctx.needs_input_grad[3] else None
