"""What to change when a model does not fit a die's DRAM: the cheapest options that really make it fit.

`cheapest_remedies` knows nothing of models: it asks `need` how many bytes the largest die takes with other
options.  `--plan` answers from config.json, a compile from the module itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from tyir.manifest import BuildOptions
from tyir.passes.annotate_sharding import MAX_DIES

__all__ = ["Need", "Remedy", "cheapest_remedies", "gib", "remedy_text"]

Need = Callable[
    [BuildOptions], int | None
]  # bytes on the largest die; None when these options cannot be chosen

# What a remedy costs, as a factor: of hardware (dies), of time (stages), of context (max-kv, batch), or by
# how much a user would rather not (judged, see the words).
_HOST_LOOKUP: Final = 1.1  # the host embeds the tokens
_NO_LOGITS: Final = 1.1  # the step returns tokens only
_CACHE_ACCURACY: Final = 1.2  # 8-bit caches with a scale per head and token
_FEW_BITS_ACCURACY: Final = 2.1  # 4-bit caches with a scale per head, token and 32 channels
_WEIGHT_ACCURACY: Final = 1.5  # 4-bit weights, rounded to nearest
_EXCHANGES: Final = 1.05  # dies exchange queries and what their keys come to
_KV_STEP: Final = 256


@dataclass(frozen=True)
class Remedy:
    """Options to add to the command line, the largest die's bytes with them, and what they cost.

    The cost is a factor; 1 would be free.
    """

    arguments: str
    nbytes: int
    cost: float

    def __str__(self) -> str:
        return f"{self.arguments} ({gib(self.nbytes)})"


def gib(nbytes: float) -> str:
    """`9.10 GiB`, or MiB below a tenth of one."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"


def remedy_text(remedies: Iterable[Remedy]) -> str:
    """The remedies as a sentence for a message's help."""
    found = [str(r) for r in remedies]
    if not found:
        return f"nothing up to {MAX_DIES} dies fits: use a smaller model"
    return (
        "the cheapest that fit, per die: " + (", ".join(found[:-1]) + " or " if found[1:] else "") + found[-1]
    )


def cheapest_remedies(options: BuildOptions, capacity: int, need: Need, count: int = 3) -> list[Remedy]:
    """At most `count` remedies by rising cost, each of which brings `need` down to `capacity`.

    Two changes together only when there are not enough single ones.
    """
    found = list(_single(options, capacity, need, MAX_DIES))
    if len(found) < count:
        enough = {r.arguments for r in found}
        most = next((int(a.split()[1]) - 1 for a in enough if a.startswith("--dies")), MAX_DIES)
        for words, base, paid in _changes(options):
            if words not in enough:  # a second change is of use only where the first does not do
                pairs = [r for r in _single(base, capacity, need, most) if r.arguments not in enough]
                found += [Remedy(f"{words} {r.arguments}", r.nbytes, paid * r.cost) for r in pairs]
    unique = {frozenset(f" {r.arguments}".split(" --")): r for r in found}
    return sorted(unique.values(), key=lambda r: (r.cost, r.arguments))[:count]


def _single(options: BuildOptions, capacity: int, need: Need, most_dies: int) -> Iterator[Remedy]:
    """One change that does."""
    for words, changed, cost in _changes(options):
        nbytes = need(changed)
        if nbytes is not None and nbytes <= capacity:
            yield Remedy(words, nbytes, cost)
    for best in (
        _fewest_stages(options, capacity, need),
        _fewest_dies(options, capacity, need, most_dies),
        _longest_cache(options, capacity, need),
    ):
        if best is not None:
            yield best


def _changes(options: BuildOptions) -> Iterator[tuple[str, BuildOptions, float]]:
    """The options that are yes or no."""
    if not options.embedding_as_input:
        yield "--embedding-as-input", replace(options, embedding_as_input=True), _HOST_LOOKUP
    if options.output == "logits":
        yield "--output argmax", replace(options, output="argmax"), _NO_LOGITS
    if options.kv_dtype == "fp16":
        yield "--kv-dtype int8", replace(options, kv_dtype="int8"), _CACHE_ACCURACY
    if options.kv_dtype != "int4":
        yield "--kv-dtype int4", replace(options, kv_dtype="int4"), _FEW_BITS_ACCURACY
    if options.kv_split == "heads":
        yield "--kv-split tokens", replace(options, kv_split="tokens"), _EXCHANGES
    if options.weights == "fp16":
        yield "--weights int4", replace(options, weights="int4"), _WEIGHT_ACCURACY
    if options.batch > 1:
        yield (
            f"--batch {options.batch // 2}",
            replace(options, batch=options.batch // 2),
            options.batch / (options.batch // 2),
        )


def _fewest_stages(options: BuildOptions, capacity: int, need: Need) -> Remedy | None:
    """The fewest more pipeline stages of the same dies.

    Dies that would share a key/value head hold other layers' instead.  A token passes the stages one after
    the other, so that it takes as many times as long.
    """
    for stages in (k for k in range(options.pp + 1, options.dies + 1) if options.dies % k == 0):
        nbytes = need(replace(options, pp=stages, mesh=()))
        if nbytes is not None and nbytes <= capacity:
            return Remedy(f"--pp {stages}", nbytes, stages / options.pp)
    return None


def _fewest_dies(options: BuildOptions, capacity: int, need: Need, most: int) -> Remedy | None:
    """The smallest larger number of dies that the pipeline stages divide."""
    numbers = range(options.dies + options.pp, most + 1, options.pp)
    least = need(replace(options, dies=numbers[-1], die_map=(), mesh=())) if numbers else None
    for dies in numbers if least is not None and least <= capacity else ():
        nbytes = need(replace(options, dies=dies, die_map=(), mesh=()))
        if nbytes is not None and nbytes <= capacity:
            return Remedy(f"--dies {dies}", nbytes, dies / options.dies)
    return None


def _longest_cache(options: BuildOptions, capacity: int, need: Need) -> Remedy | None:
    """The longest cache that fits, a multiple of 256 tokens where that many fit.

    The need grows with the cache in a straight line.
    """
    least = max(options.seqlens)
    low, high = need(replace(options, max_kv=least)), need(options)
    if low is None or high is None or low > capacity or options.max_kv <= least:
        return None
    tokens = least + int((capacity - low) / max((high - low) / (options.max_kv - least), 1e-9))
    tokens = min(tokens, options.max_kv - 1)
    tokens = tokens // _KV_STEP * _KV_STEP if tokens >= max(_KV_STEP, least) else tokens
    while tokens >= least:
        nbytes = need(replace(options, max_kv=tokens))
        if nbytes is not None and nbytes <= capacity:
            return Remedy(f"--max-kv {tokens}", nbytes, options.max_kv / tokens)
        tokens -= _KV_STEP if tokens > _KV_STEP else 1 + tokens // 16
    return None
