"""What may be wrong with advice for runs of a fixed length."""

import math
from collections.abc import Sequence

import numpy as np

from jaxbatch.advice.end_estimate import NOISE, EndEstimate, EndSpace, count_whole
from jaxbatch.advice.end_fit import which_are_lost
from jaxbatch.advice.end_law import BETA, GAMMA
from jaxbatch.advice.ending import Ending

_FAR = 16.0  # times the longest run, beyond which a law is not to be trusted without a word
_REPEATED = 4.0  # epochs, up to which repeated examples teach about as much as fresh ones (Muennighoff et al., 2023, arXiv 2305.16264)


def doubts_of_ends(
    estimate: EndEstimate, space: EndSpace, endings: Sequence[Ending], num_examples: int, largest_that_fits: int | None = None
) -> list[str]:
    """The doubts, a sentence each.

    Args:
        estimate: from the runs.
        space: the settings to choose from.
        endings: the runs.
        num_examples: in the training set.
        largest_that_fits: the largest batch that memory holds, if it left out sizes.
    """
    space, (size, rate) = space.suited_to(endings), estimate.best
    advised = space.batch_sizes[size], space.learning_rates[rate]
    doubts, horizon = [], space.num_steps != space.payable_steps
    if not horizon and not count_whole(endings, space)[size, rate]:
        doubts.append("The advised setting was never run to its end: it is read from the law of the others.")
    elif not horizon and count_whole(endings, space)[size, rate] == 1:
        doubts.append("One whole run of the advised setting was made, and the best of several looks better than it is.")
    lost = which_are_lost(endings, space.scale, space.start)
    mine = [is_lost for ending, is_lost in zip(endings, lost, strict=True) if (ending.batch_size, ending.learning_rate) == advised]
    if any(mine):
        ends = "diverged, or ended as if they had learned nothing: take a smaller rate."
        doubts.append(f"{sum(mine)} of {len(mine)} runs of the advised setting {ends}")
    for name, index, values, flag in (("learning rate", rate, space.learning_rates, "rates"), ("batch size", size, space.batch_sizes, "sizes")):
        if len(values) > 1 and index in (0, len(values) - 1):
            side = "smallest" if index == 0 else "largest"
            if not (name == "batch size" and index == 0 and values[0] <= 2):
                bound = largest_that_fits if name == "batch size" and index and 2 * values[index] > (largest_that_fits or 0) else None
                more = f"memory holds at most {bound}" if bound else f"try {flag} beyond it"
                doubts.append(f"The {name} {values[index]:g} is the {side} that was considered: {more}.")
    if (worse := worse_with_length(endings, space, float(np.median(estimate.fitted.sigma)))) is not None:
        doubts.append(worse)
    if horizon:
        doubts += _doubts_of_horizon(estimate, space, num_examples)
    return doubts


def why_no_end(metric: str, endings: Sequence[Ending]) -> str:
    """Why no run came to its end.

    Example:
        >>> why_no_end("f1", [Ending(8, 0.1, 0, 9, 9, False, math.nan, ((9, math.nan),))])
        'f1 was not finite at the end of 1 of 1 runs, and no run ended with a number: check metrics_fn.'
    """
    if not endings:
        return "No run was made: give more time."
    not_known = sum(not ending.diverged and not math.isfinite(ending.value) for ending in endings)
    if not_known:
        return f"{metric} was not finite at the end of {not_known} of {len(endings)} runs, and no run ended with a number: check metrics_fn."
    return "No run came to its end: training diverged, try smaller learning rates."


def worse_with_length(endings: Sequence[Ending], space: EndSpace, sigma: float) -> str | None:
    """A sentence if all runs of the longest length end worse than a shorter one, which the law does not know of, by more than runs differ by chance.

    Args:
        endings: the runs.
        space: the settings, with the scale that suits the runs.
        sigma: the standard deviation from run to run, on that scale.
    """
    lost = which_are_lost(endings, space.scale, space.start)
    ended = [ending for ending, is_lost in zip(endings, lost, strict=True) if ending.ended and not is_lost]
    long = [ending for ending in ended if ending.num_steps >= space.payable_steps[ending.batch_size]]
    short = [ending for ending in ended if ending.num_steps < 0.6 * space.payable_steps[ending.batch_size]]
    if len(long) < 2 or not short:
        return None
    best = [min(group, key=lambda ending: space.scale.write(ending.value)) for group in (long, short)]
    if space.scale.write(best[0].value) - space.scale.write(best[1].value) <= NOISE * sigma:
        return None
    part = best[1].num_steps / space.payable_steps[best[1].batch_size]
    return (
        f"A run of {part:.0%} of the length ended with {best[1].value:.4g}, better than every whole run ({best[0].value:.4g} at best): "
        "the model overfits, and a shorter run is better than any batch size."
    )


def _doubts_of_horizon(estimate: EndEstimate, space: EndSpace, num_examples: int) -> list[str]:
    size = space.batch_sizes[estimate.best[0]]
    longest, asked = space.payable_steps[size] * size, space.num_steps[size] * size
    doubts = []
    if asked > _FAR * longest:
        doubts.append(f"The horizon is {asked / longest:.0f} times as long as the longest run: laws fitted to short runs may not hold that far.")
    names = (("the critical batch size grows", BETA, ""), ("the best learning rate falls", GAMMA, ""))
    for what, column, _ in names:
        low, middle, high = np.quantile(estimate.fitted.draws[:, column], [0.05, 0.5, 0.95])
        if low <= 0 <= high:
            doubts.append(f"Whether {what} with the length is not shown by these runs (power {middle:.2f}, 90% between {low:.2f} and {high:.2f}).")
    if asked > _REPEATED * num_examples and asked > longest:
        doubts.append(
            f"At the horizon every example is seen {asked / num_examples:.0f} times, in the longest run {longest / num_examples:.1f} times: "
            "what repetition costs is known only as far as the runs went."
        )
    return doubts
