"""Running statistics on the GPU: one launch for averages and counters."""

from __future__ import annotations

from ._channel_calls import contiguous
from ._channel_forms import power_of_two
from ._launch import launch
from ._op import op
from ._tracking import track_statistics

_BLOCK = 1024


@op(
    "track_statistics(Tensor(a!)? first, Tensor? first_new, Tensor(b!) second, Tensor second_new,"
    " Tensor(c!)? tracked, Tensor(d!)? skipped, Tensor? rate, float? factor, int batches) -> ()",
    fake=lambda *_: None,
)
def track(first, first_new, second, second_new, tracked, skipped, rate, factor, batches):
    """Moves one or two running statistics (C,) in place towards new ones, float32.

    first_new, second_new: (C,) or (K, C), of which the mean over K is taken. Their weight is `rate`, a number
    on the device, or else `factor`, or with neither batches / tracked. tracked: becomes `batches` more.
    skipped: counts batches that would leave something not finite, which then move nothing; without it they do.
    """
    channels = second.numel()
    rows = second_new.numel() // channels
    tile = {"R": 1 if rows == 1 else 16}
    tile["B"] = min(power_of_two(channels), _BLOCK // tile["R"])
    plain = rate is None and factor is None
    programs = 1 if plain or skipped is not None else -(-channels // tile["B"])
    new = (contiguous(first_new), contiguous(second_new))
    numbers = (channels, rows, batches, factor or 0.0)
    tensors = (*new, first, second, tracked, skipped, rate)
    launch(track_statistics, programs, second.device, *tensors, *numbers, PLAIN=plain, **tile)
