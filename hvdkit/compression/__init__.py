"""Gradient compression by name: `Compression`.

There are two kinds. A *cast* (fp16, bf16) converts each tensor before and after the allreduce, and has no state. A
*compressor with error feedback* replaces the allreduce, and keeps the compression error for the next step.
"""

from hvdkit.collectives.casting import BF16Compressor, FP16Compressor, NoneCompressor
from hvdkit.compression.feedback import ErrorFeedback
from hvdkit.compression.powersgd import PowerSGD
from hvdkit.compression.quantised import Int8, OneBit
from hvdkit.compression.topk import TopK
from hvdkit.errors import UsageError

__all__ = ["Compression", "ErrorFeedback", "by_name"]


class Compression:
    """The compressions by name.

    `none`, `fp16` and `bf16` are classes, as in Horovod; `int8`, `onebit`, `topk` and `powersgd` are called:
    `Compression.powersgd(rank=4)`, `Compression.topk(fraction=0.01)`, `Compression.int8()`, `Compression.onebit()`.
    """

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
    int8 = Int8
    onebit = OneBit
    topk = TopK
    powersgd = PowerSGD


def by_name(spec: str) -> type[NoneCompressor] | ErrorFeedback:
    """Returns the compression for the value of a flag: a name, and optional arguments after a colon: `powersgd:rank=4`.

    Raises:
        UsageError: there is no such compression or argument, or a value is invalid.
    """
    name, _, rest = spec.partition(":")
    found = getattr(Compression, name, None) if name.isidentifier() and not name.startswith("_") else None
    if found is None:
        known = [n for n in vars(Compression) if not n.startswith("_")]
        raise UsageError(f"--compression={spec} is unknown. Choose one of {', '.join(known)}.")
    try:
        arguments = {key: float(value) for key, value in (part.split("=") for part in rest.split(",") if part)}
        if issubclass(found, ErrorFeedback):
            return found(**arguments)
        if arguments:
            raise TypeError(f"{name} takes no arguments")
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"--compression={spec} is not understood ({error}). The form is name:argument=value, for example "
            f"powersgd:rank=4 or topk:fraction=0.01."
        ) from None
    return found
