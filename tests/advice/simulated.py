"""Runs drawn from a known law of updates, in place of training: the truth that advice is held against."""

import math
from types import SimpleNamespace

import numpy as np

from jaxbatch.advice.estimates import Space
from jaxbatch.advice.probes import Probe, last_without

SIZES = tuple(2**power for power in range(1, 11))
RATES = tuple(10 ** (quarter / 4) for quarter in range(-16, 3))
NUM_EXAMPLES, LOOKS, EPOCHS = 5000, 12, 30


class Law:
    """S = S_min (1 + B_crit / B) × the price of a rate that is not the best, in plain Python; rates above the cliff diverge."""

    def __init__(self, least=60.0, critical=64.0, largest_rate=0.1, power=0.8, below=0.8, above=2.0, cliff=math.inf):
        self.least, self.critical, self.largest_rate, self.power, self.below, self.above = least, critical, largest_rate, power, below, above
        self.cliff = cliff  # of a rate ÷ the best one

    def ratio(self, batch_size, learning_rate):
        return learning_rate * (1 + self.critical / batch_size) ** self.power / self.largest_rate

    def updates(self, batch_size, learning_rate):
        ratio = self.ratio(batch_size, learning_rate)
        price = (self.above * ratio**-self.below + self.below * ratio**self.above) / (self.above + self.below)
        return self.least * (1 + self.critical / batch_size) * price


class RoughLaw(Law):
    """A law that the model's form does not catch: smooth bumps over sizes and rates."""

    def __init__(self, random, height=0.15, **settings):
        super().__init__(**settings)
        self.waves = [(*random.uniform(0.5, 1.5, 2) * random.choice([-1, 1], 2), random.uniform(0, 2 * math.pi)) for _ in range(4)]
        self.height = height

    def updates(self, batch_size, learning_rate):
        x, y = math.log2(batch_size) / 2, 2 * math.log10(learning_rate)
        bumps = sum(math.cos(by_size * x + by_rate * y + start) for by_size, by_rate, start in self.waves)
        return super().updates(batch_size, learning_rate) * math.exp(self.height * bumps / math.sqrt(2))


class Spread:
    """How much a run's updates differ from the law's: times exp(sigma z), z normal or with heavier tails."""

    def __init__(self, sigma, heavy=False):
        self.sigma, self.heavy = sigma, heavy

    def draw(self, random, shape=None):
        z = random.standard_t(4, shape) / math.sqrt(2) if self.heavy else random.standard_normal(shape)
        return np.exp(self.sigma * np.clip(z, -4, 4))

    def mean(self):
        return self.draw(np.random.default_rng(0), 100_000).mean()


class SimulatedProber:
    """Like :class:`jaxbatch.advice.probes.Prober`, with runs that need the law's updates times a random number.

    ``needed`` holds the truth of each run that was made, in order: infinite for one that diverges.
    """

    def __init__(self, law, spread, seed, looks=LOOKS):
        self.law, self.spread, self.random, self.looks = law, spread, np.random.default_rng(seed), looks
        self.task, self.needed = SimpleNamespace(num_examples=NUM_EXAMPLES), {}

    def run(self, batch_size, learning_rate, seed):
        needed, ratio = self.law.updates(batch_size, learning_rate) * self.spread.draw(self.random), self.law.ratio(batch_size, learning_rate)
        diverges = math.log(ratio) - math.log(self.law.cliff) + 0.3 * self.random.standard_normal() > 0
        self.needed[batch_size, learning_rate, seed] = math.inf if diverges else needed
        look, before = look_of(batch_size, self.looks), 0
        for number in range(1, EPOCHS * self.looks + 1):
            updates = number * look
            lost = diverges and updates >= needed / 4
            reached = bool(not lost and updates >= needed)
            loss = math.nan if lost else math.exp(-updates / needed)
            yield Probe(batch_size, learning_rate, seed, updates, reached, lost, last_without(before, updates, reached), 0.0, 0.0, loss)
            if reached or lost:
                return
            before = updates


def look_of(batch_size, looks=LOOKS):
    """Updates between two evaluations."""
    return max(1, NUM_EXAMPLES // batch_size // looks)


def random_law(random, rough=False):
    """A law as tasks have them. A rough one has bumps, and in half of the cases a cliff."""
    settings = {
        "least": math.exp(random.uniform(3, 6)),
        "critical": math.exp(random.uniform(math.log(10), math.log(400))),
        "largest_rate": 10 ** random.uniform(-2, 0),
        "power": random.uniform(0.5, 1),
        "below": 0.8 * math.exp(0.3 * random.standard_normal()),
        "above": 2 * math.exp(0.4 * random.standard_normal()),
    }
    if not rough:
        return Law(**settings)
    return RoughLaw(random, cliff=random.choice([math.inf, random.uniform(1.5, 6)]), **settings)


def space(objective):
    """The usual settings; an update takes 20 ms and 1 ms an example, so that the knee is 20."""
    return Space(SIZES, RATES, {size: 0.02 + 0.001 * size if objective == "time" else float(size) for size in SIZES})


def true_costs(law, settings):
    """The law's cost at every size and rate."""
    return np.array([[law.updates(size, rate) * settings.cost_of_update[size] for rate in settings.learning_rates] for size in settings.batch_sizes])
