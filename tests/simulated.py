"""Runs drawn from a known law of updates, in place of training: the truth that advice is held against."""

import math
from types import SimpleNamespace

import numpy as np

from jaxbatch.advice.probes import Probe
from jaxbatch.advice.search import Space

SIZES = tuple(2**power for power in range(1, 11))
RATES = tuple(10 ** (quarter / 4) for quarter in range(-16, 3))
NUM_EXAMPLES, LOOKS, EPOCHS = 5000, 12, 30


class Law:
    """S = S_min (1 + B_crit / B) × the price of a rate that is not the best, in plain Python."""

    def __init__(self, least=60.0, critical=64.0, largest_rate=0.1, power=0.8, below=0.8, above=2.0):
        self.least, self.critical, self.largest_rate, self.power, self.below, self.above = least, critical, largest_rate, power, below, above

    def updates(self, batch_size, learning_rate):
        noise = 1 + self.critical / batch_size
        ratio = learning_rate * noise**self.power / self.largest_rate
        price = (self.above * ratio**-self.below + self.below * ratio**self.above) / (self.above + self.below)
        return self.least * noise * price


class SimulatedProber:
    """Like :class:`jaxbatch.advice.probes.Prober`, with runs that need the law's updates times a lognormal number."""

    def __init__(self, law, sigma, seed):
        self.law, self.sigma, self.random = law, sigma, np.random.default_rng(seed)
        self.task = SimpleNamespace(num_examples=NUM_EXAMPLES)

    def run(self, batch_size, learning_rate, seed):
        needed = self.law.updates(batch_size, learning_rate) * math.exp(self.sigma * self.random.standard_normal())
        look = max(1, NUM_EXAMPLES // batch_size // LOOKS)
        for number in range(1, EPOCHS * LOOKS + 1):
            updates = number * look
            yield Probe(batch_size, learning_rate, seed, updates, updates >= needed, False, updates, 0.0, 0.0, math.exp(-updates / needed))
            if updates >= needed:
                return


def random_law(random):
    """A law as tasks have them."""
    return Law(
        least=math.exp(random.uniform(3, 6)),
        critical=math.exp(random.uniform(math.log(10), math.log(400))),
        largest_rate=10 ** random.uniform(-2, 0),
        power=random.uniform(0.5, 1),
        below=0.8 * math.exp(0.3 * random.standard_normal()),
        above=2 * math.exp(0.4 * random.standard_normal()),
    )


def space(objective):
    """The usual settings; an update takes 20 ms and 1 ms an example, so that the knee is 20."""
    return Space(SIZES, RATES, {size: 0.02 + 0.001 * size if objective == "time" else float(size) for size in SIZES})


def true_costs(law, settings):
    """The law's cost at every size and rate."""
    return np.array([[law.updates(size, rate) * settings.cost_of_update[size] for rate in settings.learning_rates] for size in settings.batch_sizes])
