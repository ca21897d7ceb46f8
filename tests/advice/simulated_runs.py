"""A training script drawn from a known law, as jb.advise_runs sees it: a generator of looks."""

import math

import numpy as np

import jaxbatch as jb
from tests.advice.simulated import Law, Spread

SIZES, RATES = tuple(2**power for power in range(2, 10)), tuple(10 ** (quarter / 4) for quarter in range(-16, 3))


def seconds_of(batch_size):
    return 0.004 * (1 + batch_size / 48)


class Script:
    """Runs of a law; the value falls from 1 to the goal 0.1 at the updates that the law says, in a straight line of its logarithm."""

    def __init__(self, law=None, sigma=0.15, look=None, largest=math.inf, startup=0.5):
        self.law, self.spread, self.look, self.largest, self.startup = law or Law(cliff=5.0), Spread(sigma), look, largest, startup
        self.begun, self.closed, self.updates = 0, 0, 0

    def run(self, batch_size, learning_rate, seed):
        self.begun += 1
        try:
            if batch_size > self.largest:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            random = np.random.default_rng([seed, batch_size, int(1e6 * learning_rate)])
            needed = self.law.updates(batch_size, learning_rate) * self.spread.draw(random)
            lost = math.log(self.law.ratio(batch_size, learning_rate) / self.law.cliff) + 0.3 * random.standard_normal() > 0
            look, pace = self.look or max(1, 400 // batch_size), seconds_of(batch_size) * math.exp(0.05 * random.standard_normal())
            for number in range(1, 10**6):
                updates = number * look
                self.updates += look
                value = math.nan if lost and updates > needed / 4 else 0.1 ** (updates / needed)
                yield jb.Look(updates, updates * batch_size, self.startup + updates * pace, value)
        finally:
            self.closed += 1


def regret(script, advice, cost=seconds_of):
    """The cost of the advised setting by the law ÷ that of the best one."""
    needed = {(size, rate): cost(size) * script.law.updates(size, rate) for size in SIZES if size <= script.largest for rate in RATES}
    return cost(advice.batch_size) * script.law.updates(advice.batch_size, advice.learning_rate) / min(needed.values())
