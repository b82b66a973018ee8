"""The whole decoder in float64 NumPy, written from the papers: what the JAX model is held against.

Plain on purpose: every expert runs on every token, attention holds the whole square, capacity walks
over tokens one by one. It reads the package's configs (by attribute, nothing is imported) and its
parameter trees; it shares no code with it. Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3
(2412.19437), YaRN (2309.00071), ST-MoE (2202.08906). tests/models/test_transformers.py holds it
against transformers.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Routing:
    """What one MoE layer did. `margin`: how far its closest choice was from falling otherwise."""

    counts: np.ndarray
    dropped: int
    tokens: int
    entropy: float
    sequence_loss: float
    uniform_loss: float
    z_loss: float
    margin: float


@dataclasses.dataclass
class Selection:
    """What one sparse attention kept [B, T, T]; of an indexer also its divergence and `inputs`:
    what it saw (its layer's input, compressed queries, the attention), which it learns nothing to.
    """

    keep: np.ndarray
    kept: int
    margin: float
    divergence: float = 0.0
    inputs: tuple = ()


@dataclasses.dataclass
class Result:
    """A forward pass: logits and hidden states by depth, and what each block path's layers did."""

    hidden: np.ndarray
    logits: np.ndarray
    mtp: list[np.ndarray]
    mtp_logits: list[np.ndarray]
    routing: dict[str, list[Routing]]
    selection: dict[str, list[Selection]]

    @property
    def margin(self) -> float:
        blocks = [*self.routing.values(), *self.selection.values()]
        return min((layer.margin for layers in blocks for layer in layers), default=math.inf)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logsumexp(x):
    top = x.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def rms_norm(x, scale, eps):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def feed_forward(x, part):
    gate, up = x @ part["gate"]["weight"], x @ part["up"]["weight"]
    return (gate * sigmoid(gate) * up) @ part["down"]["weight"]


# Rotary positions. DeepSeek: factor on cos and sin is mscale over mscale_all_dim; the softmax scale
# takes mscale_all_dim's squared.


def mscale(factor, m):
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1


def frequencies(dim, theta, yarn):
    plain = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    if yarn is None:
        return np.array(plain)

    def correction(rotations):
        length = yarn.original_length / (rotations * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(correction(yarn.beta_fast)), 0)
    high = min(math.ceil(correction(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    out = []
    for j, f in enumerate(plain):
        ramp = min(max((j - low) / (high - low), 0), 1)
        out.append(f / yarn.factor * ramp + f * (1 - ramp))
    return np.array(out)


def rotate(x, positions, theta, yarn, interleaved):
    """x [B, T, N, P]; interleaved pairs stay interleaved here."""
    dim = x.shape[-1]
    angle = positions[:, :, None, None] * frequencies(dim, theta, yarn)
    size = 1.0
    if yarn is not None:
        size = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    cos, sin = np.cos(angle) * size, np.sin(angle) * size
    one = slice(0, None, 2) if interleaved else slice(0, dim // 2)
    two = slice(1, None, 2) if interleaved else slice(dim // 2, None)
    out = np.empty_like(x)
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., two] * cos + x[..., one] * sin
    return out


def softmax_scale(width, yarn):
    scale = width**-0.5
    if yarn is not None and yarn.mscale_all_dim:
        scale *= mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def attend(q, k, v, allowed, scale, bias=0.0):
    """q [B, T, N, H], k, v [B, T, N, ...], allowed [B, T, T]; rows with nothing allowed give 0.

    Returns the result and the weights [B, N, T, T].
    """
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale + bias
    scores = np.where(allowed[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(top), top, 0))
    e /= np.maximum(e.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bnts,bsnh->btnh", e, v), e


def allowed_pairs(segments, window):
    t = np.arange(segments.shape[1])
    back = t[:, None] - t[None, :]
    near = (back >= 0) & (back < (window or math.inf))
    return near[None] & (segments[:, :, None] == segments[:, None, :])


def grouped_query_attention(x, p, config, segments, positions, inputs=None):
    def project(part):
        y = np.einsum("btd,dnh->btnh", x, part["weight"])
        return y + part["bias"] if config.bias else y

    q, k, v = project(p["q"]), project(p["k"]), project(p["v"])
    turn = (positions, config.rope_theta, config.yarn, False)
    q, k = rotate(q, *turn), rotate(k, *turn)
    share = config.num_heads // config.num_kv_heads
    k, v = np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)
    scale = softmax_scale(config.head_dim, config.yarn)
    allowed, bias, selection = allowed_pairs(segments, config.window), 0.0, None
    if type(config).__name__ == "GatedGQA":
        gate = (x @ p["gate"])[..., 0]
        bias = -np.log1p(np.exp(-gate))[:, None, None]
        selection = gate_selection(gate, allowed, segments, config.ratio)
        allowed = selection.keep
    out, _ = attend(q, k, v, allowed, scale, bias)
    return np.einsum("btnh,nhd->btd", out, p["o"]["weight"]), selection


def gate_selection(gate, allowed, segments, ratio):
    """Each query keeps the best ceil(ratio * n) of the n tokens that it sees, and itself.

    Gates are compared with 8 significant bits; `margin` is 100 times the distance from one that
    would be rounded otherwise.
    """
    part, power = np.frexp(gate)
    gate = np.ldexp(np.round(part * 256), power)
    margin = np.ldexp(np.abs(part * 256 % 1 - 0.5) / 256, power).min() * 100
    keep = np.zeros(allowed.shape, bool)
    for b, t in np.ndindex(*gate.shape):
        seen = np.flatnonzero(allowed[b, t])
        most = math.ceil(ratio * len(seen) - 1e-9)
        keep[b, t, seen[best(gate[b, seen], most)[0]]] = keep[b, t, t] = True
    return Selection(keep, int(keep[segments > 0].sum()), margin)


def index_scores(x, low, p, config, positions):
    """V3.2's index scores [B, T, T]: the first rope_dim of queries and keys turn, in halves."""
    turn = (positions, config.rope_theta, config.yarn, False)
    q = np.einsum("btr,rnh->btnh", low, p["q_up"]["weight"])
    k = x @ p["k"]["weight"]
    k = k - k.mean(-1, keepdims=True)
    k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6)
    k = (k * p["k_norm"]["scale"] + p["k_norm"]["bias"])[:, :, None]
    q, k = (
        np.concatenate([rotate(y[..., : config.rope_dim], *turn), y[..., config.rope_dim :]], -1)
        for y in (q, k)
    )
    products = np.maximum(np.einsum("btnh,bsh->btns", q, k[:, :, 0]), 0)
    weights = (x @ p["weight"]) / math.sqrt(config.indexer.num_heads * config.indexer.head_dim)
    return np.einsum("btns,btn->bts", products, weights)


def index_selection(scores, allowed, top_k, segments):
    """Each query's top_k highest of what it sees (all, if fewer), and the closest choice's gap."""
    keep, margin = np.zeros(allowed.shape, bool), math.inf
    for b, t in np.ndindex(*scores.shape[:2]):
        seen = np.flatnonzero(allowed[b, t])
        chosen, gap = best(scores[b, t, seen], min(top_k, len(seen)))
        margin = min(margin, gap if segments[b, t] else math.inf)  # padding is all alike
        keep[b, t, seen[chosen]] = True
    return keep, margin


def divergence(scores, attention, keep, segments):
    """KL(attention, a mean over heads, || softmax of the scores) over what is kept, summed."""
    logs = np.where(keep, scores, -1e300)
    logs = logs - logsumexp(logs)[..., None]
    gaps = attention * (np.log(np.maximum(attention, 1e-300)) - logs)
    return np.where(keep & (attention > 0), gaps, 0).sum(-1)[segments > 0].sum()


def latent_attention(x, p, config, segments, positions, inputs=None):
    low = None
    if config.q_rank is None:
        q = np.einsum("btd,dnh->btnh", x, p["q"]["weight"])
    else:
        low = rms_norm(x @ p["q_down"]["weight"], p["q_norm"]["scale"], 1e-6)
        q = np.einsum("btr,rnh->btnh", low, p["q_up"]["weight"])
    down = x @ p["kv_down"]["weight"]
    latent = rms_norm(down[..., : config.kv_rank], p["kv_norm"]["scale"], 1e-6)
    k_nope = np.einsum("btc,cnh->btnh", latent, p["k_up"]["weight"])
    v = np.einsum("btc,cnh->btnh", latent, p["v_up"]["weight"])
    turn = (positions, config.rope_theta, config.yarn, config.interleaved)
    q_rope = rotate(q[..., config.nope_dim :], *turn)
    k_rope = rotate(down[:, :, None, config.kv_rank :], *turn)
    k_rope = np.broadcast_to(k_rope, (*k_nope.shape[:3], config.rope_dim))
    q = np.concatenate([q[..., : config.nope_dim], q_rope], -1)
    k = np.concatenate([k_nope, k_rope], -1)
    scale = softmax_scale(config.nope_dim + config.rope_dim, config.yarn)
    allowed, selection = allowed_pairs(segments, None), None
    if config.indexer is not None:
        index = p["indexer"], config, positions
        allowed, margin = index_selection(
            index_scores(x, low, *index), allowed, config.indexer.top_k, segments
        )
    out, weights = attend(q, k, v, allowed, scale)
    if config.indexer is not None:
        inputs = inputs or (x, low, weights.mean(1))
        apart = divergence(index_scores(*inputs[:2], *index), inputs[2], allowed, segments)
        kept = int(allowed[segments > 0].sum())
        selection = Selection(allowed, kept, margin, apart, inputs)
    return np.einsum("btnh,nhd->btd", out, p["o"]["weight"]), selection


# Routing. Everything below works on [B, T, ...].


def best(scores, k):
    """Indices of the k highest, earlier ones first among equals, and the gap to the next one."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    if k == scores.shape[-1]:
        return order, math.inf
    ranked = np.take_along_axis(scores, order, -1)
    return order[..., :k], float((ranked[..., k - 1] - ranked[..., k]).min())


def keep_groups(ranking, num_groups, num_active_groups, num_best):
    groups = ranking.reshape(*ranking.shape[:-1], num_groups, -1)
    strength = np.sort(groups, axis=-1)[..., -num_best:].sum(-1)
    chosen, margin = best(strength, num_active_groups)
    keep = (chosen[..., None] == np.arange(num_groups)).any(-2)
    return np.where(keep[..., None], groups, -np.inf).reshape(ranking.shape), margin


def route(x, p, config):
    """-> expert ids, weights [B, T, A], distribution, logits [B, T, E], margin."""
    logits = x @ p["weight"]
    kind, num_active = type(config).__name__, config.num_active_experts
    group_margin = math.inf
    if kind == "Hierarchical":
        of_group = softmax(x @ p["groups"])
        size = logits.shape[-1] // config.num_groups
        inside = softmax(logits.reshape(*logits.shape[:-1], config.num_groups, size))
        scores = (of_group[..., None] * inside).reshape(logits.shape)
        groups, group_margin = best(of_group, config.num_active_groups)
        each = num_active // config.num_active_groups
        ids, margin = best(np.take_along_axis(inside, groups[..., None], -2), each)
        ids = (groups[..., None] * size + ids).reshape(*logits.shape[:-1], num_active)
        distribution = scores
    else:
        scores = softmax(logits) if kind == "Softmax" else sigmoid(logits)
        distribution = scores / scores.sum(-1, keepdims=True)
        ranking = scores + p["bias"] if kind == "Sigmoid" else scores
        if config.num_groups > 1:
            num_best = 2 if kind == "Sigmoid" else 1
            ranking, group_margin = keep_groups(
                ranking, config.num_groups, config.num_active_groups, num_best
            )
        ids, margin = best(ranking, num_active)
    weights = np.take_along_axis(scores, ids, -1)
    if config.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * config.scale, distribution, logits, min(margin, group_margin)


def drop_late(ids, valid, num_experts, factor):
    """Which choices find room: tokens come by position, then by row."""
    rows, length, num_active = ids.shape
    capacity = max(1, math.ceil(factor * rows * length * num_active / num_experts))
    load = np.zeros(num_experts, int)
    kept = np.zeros(ids.shape, bool)
    for t in range(length):
        for b in range(rows):
            for a in range(num_active if valid[b, t] else 0):
                expert = ids[b, t, a]
                kept[b, t, a] = load[expert] < capacity
                load[expert] += kept[b, t, a]
    return kept


def mixture(x, p, config, segments):
    valid = segments > 0
    num_experts, num_active = config.num_experts, config.router.num_active_experts
    ids, weights, distribution, logits, margin = route(x, p["router"], config.router)
    kept = np.broadcast_to(valid[..., None], ids.shape)
    if type(config.dispatch).__name__ == "Capacity":
        kept = drop_late(ids, valid, num_experts, config.dispatch.factor)
    y = np.zeros_like(x)
    counts = np.zeros(num_experts, int)
    for e in range(num_experts):
        mine = (ids == e) & kept
        counts[e] = mine.sum()
        part = {name: {"weight": leaf[e]} for name, leaf in p["experts"].items()}
        y += (weights * mine).sum(-1, keepdims=True) * feed_forward(x, part)
    if config.num_shared_experts:
        y += feed_forward(x, p["shared"])
    sequence_loss = 0.0
    for b in range(len(x)):  # V3, equations 17 to 20, for one sequence
        length = valid[b].sum()
        if length:
            chosen = (ids[b][..., None] == np.arange(num_experts)).any(1) & valid[b][:, None]
            f = num_experts / (num_active * length) * chosen.sum(0)
            sequence_loss += (f * distribution[b][valid[b]].mean(0)).sum()
    mean = distribution[valid].mean(0)
    each = distribution[valid]
    return y, Routing(
        counts=counts,
        dropped=int(valid.sum() * num_active - counts.sum()),
        tokens=int(valid.sum()),
        entropy=-(each * np.log(each)).sum() / math.log(num_experts),
        sequence_loss=sequence_loss,
        uniform_loss=(mean * np.log(mean * num_experts)).sum(),
        z_loss=(logsumexp(logits[valid]) ** 2).sum(),
        margin=margin,
    )


# The model.


def block(x, p, config, segments, positions, inputs):
    attention = config.attention
    attends = latent_attention if type(attention).__name__ == "MLA" else grouped_query_attention
    y = rms_norm(x, p["attention_norm"]["scale"], config.norm_eps)
    y, selection = attends(y, p["attention"], attention, segments, positions, inputs)
    x = x + y
    y = rms_norm(x, p["mlp_norm"]["scale"], config.norm_eps)
    if "mlp" in p:
        return x + feed_forward(y, p["mlp"]), None, selection
    y, routing = mixture(y, p["moe"], config.moe, segments)
    return x + y, routing, selection


def layers(stack):
    """The blocks of a stacked tree, one after another."""
    leaf = stack
    while isinstance(leaf, dict):
        leaf = next(iter(leaf.values()))
    return [_at(stack, r) for r in range(len(leaf))]


def _at(node, r):
    return {k: _at(v, r) for k, v in node.items()} if isinstance(node, dict) else node[r]


def float64(tree):
    if isinstance(tree, dict):
        return {name: float64(node) for name, node in tree.items()}
    return np.asarray(tree).astype(np.float64)


def forward(
    params, config, tokens, segments=None, positions=None, next_tokens=None, before=None
) -> Result:
    """Everything the model computes for tokens [B, T]; segment 0 is padding.

    `before` is a result whose indexers' inputs stay, as if they depended on no parameter.
    """
    params = float64(params)
    tokens = np.asarray(tokens)
    segments = np.ones(tokens.shape, int) if segments is None else np.asarray(segments)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    positions = np.asarray(positions)
    table = params["embedding"]["weight"]
    head = table.T if config.tie_embeddings else params["head"]["weight"]
    x, routing, selection = table[tokens], {}, {}

    def run(x, stack, path):
        for number, p in enumerate(layers(stack)):
            known = before.selection[path][number].inputs if before and before.selection else None
            x, *found = block(x, p, config, segments, positions, known)
            for one, held in zip(found, (routing, selection), strict=True):
                if one is not None:
                    held.setdefault(path, []).append(one)
        return x

    for name in sorted(name for name in params if name.startswith("segment_")):
        x = run(x, params[name]["block"], f"{name}/block")
    hidden = rms_norm(x, params["final_norm"]["scale"], config.norm_eps)
    previous, mtp = hidden, []
    for d in range(config.num_mtp_layers if next_tokens is not None else 0):
        p = params[f"mtp_{d}"]
        embedded = rms_norm(
            table[np.asarray(next_tokens)[..., d]], p["embedding_norm"]["scale"], config.norm_eps
        )
        seen = rms_norm(previous, p["hidden_norm"]["scale"], config.norm_eps)
        x = np.concatenate([embedded, seen], -1) @ p["projection"]["weight"]
        x = run(x, p["block"], f"mtp_{d}/block")
        previous = rms_norm(x, p["final_norm"]["scale"], config.norm_eps)
        mtp.append(previous)
    return Result(hidden, hidden @ head, mtp, [h @ head for h in mtp], routing, selection)


def token_losses(logits, targets):
    """Negative log-likelihood of every target."""
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    return logsumexp(logits) - chosen
