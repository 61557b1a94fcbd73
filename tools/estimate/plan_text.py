"""A plan as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from tyir.backends.edge10.memory.remedies import gib
from tyir.tools.estimate.cards import fastest_on_cards

if TYPE_CHECKING:
    from tyir.tools.estimate.plan import Plan

__all__ = ["duration", "lines"]

_MARK: Final = {"heads": "", "tokens": " t"}


def duration(seconds: float) -> str:
    """`41 s`, `13.7 min` or `4.6 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def lines(plan: Plan) -> Iterator[str]:
    """What `--plan` prints, line by line."""
    s, o, m = plan.shape, plan.options, plan.machine
    kind = (
        "fp16"
        if plan.group is None
        else f"int4 in groups of {plan.group or 'a row'}"
        + (" (the checkpoint's)" if s.group is not None else "")
    )
    yield f"{s.name}: {s.layers} layers, {s.parameters / 1e9:.3f} G parameters; decoder weights {kind}"
    stages = f" in {o.pp} pipeline stages" if o.pp > 1 else ""
    yield (
        f"{o.dies} die{'s' * (o.dies > 1)} of {m.name}{stages}, lengths {','.join(map(str, o.seqlens))}, a"
        f" cache of {o.max_kv} tokens"
        + (f", cut by tokens over each {plan.kv_parts} dies" if plan.kv_parts > 1 else "")
    )
    yield f"{'die':>4}{'weights':>12}{'KV cache':>12}{'activations':>13}{'total':>12}{'of DRAM':>9}"
    for i, n in enumerate(plan.dies):
        share = f"{100 * n.total / m.dram.capacity_bytes:.0f} %"
        yield f"{i:>4}{gib(n.weights):>12}{gib(n.kv_cache):>12}{gib(n.activations):>13}{gib(n.total):>12}{share:>9}"  # noqa: E501
    each = max(n.kv_cache for n in plan.dies) // (o.max_kv * o.batch)
    yield f"cache: {each:,} bytes a token on the largest die ({o.kv_dtype})"
    if o.kv_dtype == "int4":
        yield (
            "  layers whose keys 4 bits would not hold are found when weights are read, and named: theirs"
            " then take 8 bits, a layer about 1.4 times as much"
        )
    if plan.tower is not None:
        size = 2 * plan.tower.parameters
        yield (
            f"tower: {plan.tower.blocks} blocks, {plan.tower.parameters / 1e6:.1f} M parameters in fp16,"
            f" {gib(size)}: whole on each die, which it is at most"
        )
        for picture in plan.pictures:
            yield from picture.lines(o.max_kv)
    sram = m.sram.capacity_bytes
    state = max(o.seqlens) * s.hidden * 2
    yield (
        f"on-chip: the hidden state of the longest step takes {gib(state)} of {gib(sram)}; weights are tiled"
        " into the rest"
    )
    slow, point, fast = plan.tokens_per_second
    yield f"decoding: {slow:.1f} to {fast:.1f} tokens/s (point {point:.1f}) with a full cache"
    yield (
        "  = 1 / (bytes of the slowest die / (DRAM bandwidth x efficiency) + collectives + host step),"
        f" constants and bounds of {m.name}"
    )
    yield (
        f"host: about {gib(plan.host_ram)} of memory, {gib(plan.host_disk)} of disk,"
        f" {plan.host_seconds[0]:.0f} to {plan.host_seconds[1]:.0f} s"
    )
    yield (
        "  = libraries + the largest tensor's intermediates; artifacts; import + 0.5 to 3 s of code per die"
        " and length + 50 to 400 MB/s of weights"
    )
    if (p := plan.prompt) is not None:
        yield (
            f"a prompt of {p.tokens} tokens: {p.steps} steps, {duration(p.prefill)} until the first token,"
            f" then {1000 * p.token:.0f} ms a token"
        )
        if (choice := plan.options.choice) is not None:
            yield (
                f"  steps of {max(plan.options.seqlens)} tokens see {choice.keep} blocks of {choice.block}"
                f" for each range of the cache, and the last {choice.window} tokens; the end of the prompt"
                " sees all of it (sparse prefill)"
            )
        if p.overlapped is not None:
            yield (
                f"  {duration(p.overlapped)} if the pipeline stages work on several chunks at a time, as with"
                " --embedding-as-input --output-rows last"
                + (" (less what sparse steps wait to measure)" if plan.options.choice is not None else "")
            )
        yield (
            "  = one layer of each kind simulated on the command programs at a few positions, with"
            f" {m.name}'s point constants; the runtime keeps a row of logits and the cache, whatever the"
            " length"
        )
    if plan.on_cards:
        pos = o.max_kv - min(o.seqlens)
        yield f"cards of {m.d2d.package_dies} dies: a token at position {pos}, simulated"
        yield f"{'stages':>8}{'largest die':>14}{'ms a token':>12}{'between cards':>15}{'bound by':>10}"
        for c in plan.on_cards:
            ms, links = c.spread.token * 1e3, c.spread.links * 1e3
            yield f"{c.spread.stages:>8}{gib(c.largest):>14}{ms:>12.1f}{links:>15.2f}{c.spread.bound_by:>10}"
        fastest = fastest_on_cards(plan.on_cards, m)
        yield "  none fits" if fastest is None else f"  fastest that fits: --pp {fastest.spread.stages}"
    if plan.longest:
        yield f"tokens that {'a sequence' if o.batch == 1 else 'each sequence'} can cache, {o.kv_dtype}:"
        stages_found = sorted({n.stages for n in plan.longest})
        yield f"{'dies':>6}" + "".join(f"{f'pp {k}':>14}" for k in stages_found)
        for dies in sorted({n.dies for n in plan.longest}):
            found = {n.stages: f"{n.tokens}{_MARK[n.kv_split]}" for n in plan.longest if n.dies == dies}
            yield f"{dies:>6}" + "".join(f"{found.get(k, '-'):>14}" for k in stages_found)
        if any(n.kv_split == "tokens" for n in plan.longest):
            yield f"  {_MARK['tokens'].strip()}: caches cut by tokens (--kv-split)"
    if o.max_kv > s.positions:
        yield f"note: the cache holds {o.max_kv} tokens, the model was trained for {s.positions} positions"
