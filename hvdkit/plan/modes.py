"""The training modes that the planner compares, with the bytes that each sends."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit.plan.cost import BUCKET_BYTES, Division, Mode

LOCAL_STEPS, DILOCO_STEPS, ACCUMULATED = 20, 100, 5  # DiLoCo and local SGD rounds are whole executions of 10 steps
FRAGMENTS = 4  # of streaming DiLoCo
_SCATTERING = ("int8", "onebit")
FEEDBACK = ("int8", "onebit", "topk", "powersgd")
ABOUT = {  # what each mode does, for tables
    "data parallel": "all ranks average all gradients in each step",
    "fp16": "averages gradients of 16 bits",
    "int8": "averages gradients of 8 bits",
    "onebit": "averages the gradients' signs",
    "topk": "averages the largest 1 % of the gradients",
    "powersgd": "averages low-rank approximations of the gradients",
    "accumulation": f"averages gradients once in {ACCUMULATED} steps",
    "local SGD": f"each rank trains alone; averages weights once in {LOCAL_STEPS} steps",
    "DiLoCo": f"as local SGD, once in {DILOCO_STEPS} steps, with an outer optimizer",
    "streaming DiLoCo": f"as DiLoCo, in {FRAGMENTS} parts sent while training goes on",
    "mirrored": "one process with a replica on each device (tf.distribute)",
    "tensor parallel": "divides each layer over the ranks",
    "pipeline parallel": "divides the model into consecutive stages",
    "independent": "no exchange: each rank trains a model of its own",
}
NAMES = tuple(ABOUT)


def all_modes(
    shapes: Sequence[Sequence[int]],
    optimizer: str,
    compression_seconds: Mapping[str, float],
    divisions: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Mode]:
    """Return all modes by name.

    Args:
        shapes: shapes of the trainable weights.
        optimizer: value of the flag `--optimizer` of hvdkit.train.
        compression_seconds: compute seconds per step, by compressor; compressors that are not in it are left out.
        divisions: by model-parallel strategy, how it divides the model (see `hvdkit.bench.rank`).
    """
    colon = "," if ":" in optimizer else ":"
    accumulate = f"--optimizer={optimizer}{colon}gradient_accumulation_steps={ACCUMULATED}"
    mean = "--outer-learning-rate=1 --outer-momentum=0"
    early = _early_share(shapes)
    modes = [
        Mode("data parallel", early=early, word_elements=1),
        Mode("fp16", "--compression=fp16", share=0.5, exact=False, early=early, word_elements=2),
        *(_with_feedback(name, shapes, compression_seconds[name]) for name in FEEDBACK if name in compression_seconds),
        Mode("accumulation", accumulate, every=ACCUMULATED, exact=False),
        Mode("local SGD", f"--local-steps={LOCAL_STEPS} {mean}", every=LOCAL_STEPS, exact=False),
        Mode("DiLoCo", f"--local-steps={DILOCO_STEPS}", every=DILOCO_STEPS, exact=False),
        *([_streaming(min(FRAGMENTS, len(shapes)))] if len(shapes) > 1 else []),
        Mode("mirrored", "--strategy=mirrored", one_host=True),
        *(
            Mode(f"{name} parallel", f"--strategy={name}", division=Division(**division))
            for name, division in (divisions or {}).items()
        ),
        Mode("independent", "--strategy=single", share=0.0, every=10**9),
    ]
    return {mode.name: mode for mode in modes}


def _early_share(shapes: Sequence[Sequence[int]]) -> float:
    """Return the fraction of the gradients in all buckets but the last; see `hvdkit.optimizers.groups.buckets`."""
    buckets = [0]
    for shape in reversed(shapes):
        if buckets[-1] >= BUCKET_BYTES:
            buckets.append(0)
        buckets[-1] += 4 * math.prod(shape)
    if buckets[-1] < BUCKET_BYTES and len(buckets) > 1:
        buckets[-2:] = [sum(buckets[-2:])]
    return sum(buckets[:-1]) / sum(buckets)


def _streaming(fragments: int) -> Mode:
    flags = f"--local-steps={DILOCO_STEPS} --fragments={fragments}"
    hidden = min(5, DILOCO_STEPS // fragments)  # LocalSGD's default
    return Mode("streaming DiLoCo", flags, every=DILOCO_STEPS, exact=False, exchanges=fragments, hidden=hidden)


def _with_feedback(name: str, shapes: Sequence[Sequence[int]], seconds: float) -> Mode:
    from hvdkit.collectives.traffic import elements, ring_bytes
    from hvdkit.compression import by_name

    compressor: Any = by_name(name)
    known = [tuple(shape) for shape in shapes]
    sent, whole = compressor.wire_bytes(known, 2), ring_bytes(4 * elements(known), 2)
    gathers = name == "topk"  # its share is of one rank's bytes, not of the ring's two passes
    share = sent / (4 * elements(known)) if gathers else sent / whole
    return Mode(
        name,
        f"--compression={name}",
        share,
        extra=seconds,
        gathers=gathers,
        scatters=name in _SCATTERING,
        exact=False,
        exchanges=1 if gathers else 2,
    )
