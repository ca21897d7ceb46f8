"""Runs of a fixed length drawn from a known law of what they end with, in place of training."""

import math

import numpy as np

from jaxbatch.advice.end_estimate import EndSpace, largest_within, make_estimate
from jaxbatch.advice.end_law import Scale
from jaxbatch.advice.end_search import search_endings
from jaxbatch.advice.ending import Ending

SIZES = tuple(2**power for power in range(2, 12))
RATES = tuple(float(f"{10 ** (quarter / 4):.3g}") for quarter in range(-16, 3))
NUM_EXAMPLES = 20_000


class EndLaw:
    """What runs end with, in plain Python: of a form near that of the fit, but with bumps, and with a price of very small batches."""

    def __init__(self, seed, rough=True):
        random = np.random.default_rng(seed)
        drawn = lambda mean, spread: math.exp(random.normal(math.log(mean), spread))
        self.y0, self.slope, self.bend = random.normal(-1.5, 1), drawn(0.25, 0.6), random.uniform(0.05, 0.4)
        self.critical, self.beta = math.exp(random.uniform(math.log(16), math.log(1500))), random.uniform(0.1, 0.7)
        self.rate, self.gamma = math.exp(random.uniform(math.log(0.003), math.log(0.5))), random.uniform(-0.1, 0.4)
        self.power, self.below, self.above, self.cliff = random.uniform(0.4, 1.1), drawn(0.8, 0.3), drawn(1.3, 0.4), random.uniform(1, 4)
        self.sigma = self.slope * math.exp(random.normal(math.log(0.08), 0.5))
        self.small = rough * random.uniform(0, 0.3) * random.integers(0, 2)
        self.waves = 0.04 * rough * random.normal(size=(3, 4))
        self.start = self.y0 + random.uniform(1.5, 3.5)
        self.early = rough * math.exp(random.uniform(math.log(0.003), math.log(0.3)))

    def log_ratio(self, size, rate, length):
        early = 0.8 * math.log1p(self.early * math.exp(-length))
        return math.log(rate / self.rate) + self.gamma * length - early + self.power * math.log1p(self.critical / size)

    def log_data(self, size, rate, length):
        ratio = self.log_ratio(size, rate, length)
        off = math.log((self.above * math.exp(-self.below * ratio) + self.below * math.exp(self.above * ratio)) / (self.above + self.below))
        bumps = sum(a * math.sin(b * math.log(size) + c * math.log(rate) + d * length) for a, b, c, d in self.waves)
        return length - math.log1p(size / (self.critical * math.exp(self.beta * length))) - off + bumps - self.small * math.log1p(8 / size)

    def value(self, size, rate, length=0.0):
        data = self.log_data(size, rate, length)
        return min(self.y0 + self.slope * math.expm1(-self.bend * data) / self.bend, self.start)

    def lost(self, size, rate, length=0.0):
        return 1 / (1 + math.exp(min(-(self.log_ratio(size, rate, length) - self.cliff) / 0.2, 700)))


class SimulatedEnds:
    """Makes runs from a law, with looks at quarters."""

    def __init__(self, law):
        self.law, self.made = law, 0

    def run(self, batch_size, learning_rate, num_steps, seed):
        self.made += 1
        random, length = np.random.default_rng([seed, batch_size, num_steps]), math.log(num_steps * batch_size / NUM_EXAMPLES)
        end = self.law.value(batch_size, learning_rate, length) + self.law.sigma * random.standard_normal()
        lost, looks = random.uniform() < self.law.lost(batch_size, learning_rate, length), ()
        for part in (0.25, 0.5, 0.75, 1.0):
            updates = max(1, round(part * num_steps))
            if lost and part == 0.5:
                yield Ending(batch_size, learning_rate, seed, num_steps, updates, True, math.nan, looks)
                return
            value = math.exp(min(self.law.start, end + 2 * self.law.slope * (1 - part)))
            looks += ((updates, value),)
            yield Ending(batch_size, learning_rate, seed, num_steps, updates, False, value, looks)


def space_of(law, sizes=SIZES, rates=RATES, *, times=1):
    """The settings for a law; runs may be ``times`` shorter than the length that is asked about."""
    asked = {size: max(1, NUM_EXAMPLES // size) for size in sizes}
    payable = {size: max(1, steps // times) for size, steps in asked.items()}
    return EndSpace(sizes, rates, asked, payable, Scale("log", False), math.exp(law.start), float(NUM_EXAMPLES))


def advised(law, seed, *, full_runs=8.0, times=1):
    """The search's answer for a law, and how good it is by the truth."""
    space, runs = space_of(law, times=times), SimulatedEnds(law)
    endings = search_endings(runs, space, first_size=64, most=full_runs, seed=1000 * seed)
    estimate = make_estimate(endings, space, final=True)
    truth = np.array([[law.value(size, rate) + law.lost(size, rate) * (law.start - law.value(size, rate)) for rate in RATES] for size in SIZES])
    best = np.unravel_index(truth.argmin(), truth.shape)
    size, rate = SIZES[estimate.best[0]], RATES[estimate.best[1]]
    lengths = np.linspace(0, 3, 301)
    later = np.array([law.value(size, rate, length) for length in lengths])
    reached = np.flatnonzero(later <= truth[best])
    more_data = math.exp(lengths[reached[0]]) if len(reached) else math.inf
    largest, low_high = largest_within(estimate, space, None), np.quantile(np.log(SIZES)[estimate.value.min(2).argmin(1)], [0.05, 0.95])
    rates = estimate.rates
    in_noise = None if largest is None else truth[SIZES.index(largest), rates[SIZES.index(largest)]] - truth[best] <= 1.96 * law.sigma
    holds_best = low_high[0] - 1e-9 <= math.log(SIZES[best[0]]) <= low_high[1] + 1e-9
    return more_data, in_noise, holds_best, (truth[estimate.best] - truth[best]) / law.sigma
