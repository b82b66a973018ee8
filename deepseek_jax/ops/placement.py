"""Where experts lie: clusters that fire together, replicas of hot ones, what tokens travel.

A placement is an array: the expert in each slot. Devices share the slots out evenly in order, nodes
the devices. `clustered` moves experts so that a token is sent to few devices; `replicated` is
DeepSeek's balancer of redundant experts (EPLB; V3, arXiv 2412.19437, section 3.4): more slots than
experts, copies of the hot ones, all packed so that devices are evenly busy. NumPy, for one layer.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.errors import InputError

STARTS = 4  # orders that the search for clusters begins from; the best end counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """What a layer's experts are spread over; a node is devices joined by a fast network."""

    num_devices: int
    num_nodes: int = 1

    def __post_init__(self):
        if self.num_nodes < 1 or self.num_devices < 1 or self.num_devices % self.num_nodes:
            raise InputError(
                f"{self.num_devices} devices are not shared out evenly over {self.num_nodes} nodes"
            )

    def of_slots(self, num_slots: int) -> np.ndarray:
        """The device of each slot; InputError unless every device gets as many."""
        if num_slots % self.num_devices:
            raise InputError(
                f"{num_slots} experts are not shared out evenly over {self.num_devices} devices"
            )
        return np.arange(num_slots) // (num_slots // self.num_devices)

    def nodes(self, device: np.ndarray) -> np.ndarray:
        """The node of each device."""
        return device // (self.num_devices // self.num_nodes)


class Traffic(NamedTuple):
    """What a placement costs."""

    devices: float
    """Devices that a token is sent to, on average: one copy for all its experts there."""
    nodes: float
    imbalance: float
    """The busiest device's choices over the mean device's; 1 is even."""


def slots_of(chosen: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The slot that serves each of the chosen experts [N, A]; tokens take an expert's in turn."""
    order = np.argsort(slots, kind="stable")
    counts = np.bincount(slots, minlength=chosen.max(initial=0) + 1)
    first, turn = np.cumsum(counts) - counts, np.arange(len(chosen))[:, None]
    if (counts[chosen] == 0).any():
        raise InputError("the placement lacks experts that tokens chose")
    return order[first[chosen] + turn % counts[chosen]]


def traffic(chosen: np.ndarray, slots: np.ndarray, devices: Devices) -> Traffic:
    """What the placement `slots` costs tokens that chose these experts [N, A]."""
    device = devices.of_slots(len(slots))[slots_of(chosen, slots)]
    load = np.bincount(device.reshape(-1), minlength=devices.num_devices)
    sent = (_distinct(device), _distinct(devices.nodes(device)))
    return Traffic(*sent, float(load.max() / max(load.mean(), 1e-9)))


def _distinct(values: np.ndarray) -> float:
    """How many different values a row [A] has, on average."""
    ordered = np.sort(values, axis=1)
    return float(1 + (ordered[:, 1:] != ordered[:, :-1]).sum() / max(len(values), 1))


def clustered(
    pairs: np.ndarray, devices: Devices, *, num_groups: int = 1, slack: float = 1.1, seed: int = 0
) -> np.ndarray:
    """An order of the experts in which those that fire together lie together: the slots [E].

    `pairs` [E, E] counts the tokens that chose both experts, its diagonal those that chose one
    (`ops.routing.coactivation`). A pair on one device counts twice one in the same node. Devices
    get at most `slack` times their even load, as far as moving single experts allows. The experts
    of each of a router's `num_groups` groups stay neighbors, groups may change places. Never
    worse than the given order, by that measure.
    """
    num_experts = len(pairs)
    group, rng = np.arange(num_experts) // (num_experts // num_groups), np.random.default_rng(seed)
    search = _Search.of(np.asarray(pairs, float), devices, group, slack)
    found = []
    for start in range(STARTS):
        order = np.arange(num_experts)
        if start:
            blocks = order.reshape(num_groups, -1)[rng.permutation(num_groups)]
            order = rng.permuted(blocks, axis=1).reshape(-1)
        while True:
            order = search.with_experts_swapped(order)
            swapped = search.with_groups_swapped(order)
            if swapped is None:
                break
            order = swapped
        found.append((search.worth(order), order))
    return max(found, key=lambda pair: pair[0])[1]


class _Search(NamedTuple):
    """Steepest ascent over swaps of two experts of a group, and of two whole groups."""

    shared: np.ndarray  # [E, E], tokens of each pair
    load: np.ndarray  # [E]
    group: np.ndarray  # [E]
    device: np.ndarray  # of each slot
    near: np.ndarray  # [devices, devices]: what a pair there counts
    limit: float  # of a device's load

    @classmethod
    def of(cls, pairs, devices, group, slack):
        load, device = np.diag(pairs), devices.of_slots(len(pairs))
        each = np.arange(devices.num_devices)
        node = devices.nodes(each)
        near = (node[:, None] == node) + (each[:, None] == each) * 1.0
        limit = slack * load.sum() / devices.num_devices
        return cls(pairs - np.diag(load), load, group, device, near, limit)

    @property
    def price(self):
        """Of a token above the limit: more than all its pairs are worth."""
        return 4.0 * len(self.load)

    def worth(self, order):
        """What the search makes as large as it can."""
        d = self._devices(order)
        over = np.maximum(np.bincount(d, self.load) - self.limit, 0).sum()
        return (self.shared * self.near[d][:, d]).sum() / 2 - self.price * over

    def _devices(self, order):
        """The device of each expert."""
        return self.device[np.argsort(order)]

    def with_experts_swapped(self, order):
        """The order after the best swap of two experts, and the next, until none gains."""
        place, same = np.argsort(order), self.group[:, None] == self.group
        while True:
            gains = self._gains(self.device[place])
            best = np.unravel_index(np.where(same, gains, -np.inf).argmax(), gains.shape)
            if gains[best] <= 1e-9 * (1 + self.load.sum()):
                return np.argsort(place)
            place[[*best]] = place[[*best[::-1]]]

    def _gains(self, d):
        """[E, E]: what two experts would gain by changing places; `d` is the device of each."""
        reach = self.shared @ self.near[d]  # [E, devices]: an expert's, if it lay on that device
        moved = reach[:, d] - reach[np.arange(len(d)), d][:, None]
        between = 2 * (self.near[d][:, d] - self.near[0, 0])  # the two still lie as far apart
        loads = np.bincount(d, self.load)[d]
        after = np.maximum((loads - self.load)[:, None] + self.load - self.limit, 0)
        over = np.maximum(loads - self.limit, 0)
        spared = np.where(d[:, None] == d, 0, over[:, None] + over - after - after.T)
        return moved + moved.T + self.shared * between + self.price * spared

    def with_groups_swapped(self, order):
        """The order after the best swap of two whole groups; None if none gains."""
        blocks = order.reshape(self.group.max() + 1, -1)
        best, least = None, self.worth(order) + 1e-9 * (1 + self.load.sum())
        for a in range(len(blocks)):
            for b in range(a):
                other = blocks.copy()
                other[[a, b]] = other[[b, a]]
                if (worth := self.worth(other.reshape(-1))) > least:
                    best, least = other.reshape(-1), worth
        return best


def replicated(
    load: np.ndarray, num_slots: int, devices: Devices, *, num_groups: int = 1
) -> np.ndarray:
    """EPLB: which expert each of `num_slots` slots holds, by the experts' load [E]: the slots.

    Where a router's groups share out over the nodes, whole groups are first packed to nodes, so
    that a token's groups stay few nodes; then each node gives its spare slots to its hottest
    experts, always the one whose replicas have most to do, and packs them to its devices. Else all
    is one node. InputError unless there is a slot for every expert and each device gets as many.
    """
    devices.of_slots(num_slots)
    if num_slots < len(load):
        raise InputError(f"{num_slots} slots are too few for {len(load)} experts")
    nodes = devices.num_nodes if num_groups % devices.num_nodes == 0 else 1
    members = np.arange(len(load)).reshape(num_groups if nodes > 1 else 1, -1)
    bins = packed(load[members].sum(1), nodes)
    slots = []
    for node in range(nodes):
        experts = members[bins == node].reshape(-1)
        copies = _copies(load[experts], num_slots // nodes)
        held, each = np.repeat(experts, copies), np.repeat(load[experts] / copies, copies)
        slots.append(held[np.argsort(packed(each, devices.num_devices // nodes), kind="stable")])
    return np.concatenate(slots)


def packed(load: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each item: the heaviest first to the lightest bin with room, all bins as full."""
    bins, sums, left = np.zeros(len(load), int), np.zeros(num_bins), len(load) // num_bins
    room = np.full(num_bins, left)
    for item in np.argsort(-load, kind="stable"):
        bins[item] = target = np.where(room > 0, sums, np.inf).argmin()
        sums[target] += load[item]
        room[target] -= 1
    return bins


def _copies(load: np.ndarray, num_slots: int) -> np.ndarray:
    """How often each expert is held: at least once, the busiest replica's expert next."""
    copies = np.ones(len(load), int)
    for _ in range(num_slots - len(load)):
        copies[(load / copies).argmax()] += 1
    return copies
