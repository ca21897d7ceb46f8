"""The sentences of README and the pages that follow from kept runs, with their numbers and with what must be true for their words."""

from scripts import kept_numbers as of
from scripts.page_findings_huge import ON_ADVICE, ON_CRITICAL, ON_HUGE, ON_NEGATIVE
from scripts.page_sentences import Sentence

README, SPLIT, GRID = "README.md", "docs/split_backward.md", "docs/mnist_study.md"
SPLIT_DIGITS, SPLIT_MNIST, SPLIT_PLAIN = (f"split_backward/{name}" for name in ("digits", "mnist", "mnist_no_momentum"))
RATES, CONVERGENCE = "learning_rate_grid/mnist", "convergence/mnist"
CRITICAL, ADVISE = "critical_batch_size/digits", "advise/digits"


def within(low: float, value: float, high: float) -> bool:
    """Whether a number is what its words say, such as "a quarter"."""
    return low <= value <= high


ON_README = [
    Sentence(
        README,
        "the split needs {ratio:.2f} times the examples of one update to reach 95% on the digits, and {small:.2f} times those of small batches.",
        lambda: {"ratio": of.split_ratio("digits", "one"), "small": of.split_ratio("digits", "small")},
        lambda: of.split_standing("digits", "one") != "better" and of.split_standing("digits", "small") == "worse",
        (SPLIT_DIGITS,),
    ),
    Sentence(
        README,
        "95% on the digits takes {b8:.0f} updates at B = 8, {b32:.0f} at 32, {b64:.0f} at 64 and {b128:.0f} at 128.",
        lambda: {f"b{size}": of.sweep_updates(size) for size in (8, 32, 64, 128)},
        lambda: of.sweep_updates(8) > 2 * of.sweep_updates(32) and of.sweep_updates(128) > 0.9 * of.sweep_updates(64),
        (CRITICAL,),
    ),
    Sentence(
        README,
        "takes {b2:.2f} ms at B = 2, {b8:.2f} ms at 8 and {b128:.1f} ms at 128: from about {knee:.0f} examples on, twice the batch takes "
        "twice the time.",
        lambda: {"b2": of.update_ms(2), "b8": of.update_ms(8), "b128": of.update_ms(128), "knee": of.knee()},
        lambda: of.update_ms(8) < 2.5 * of.update_ms(2) and of.update_ms(128) > 8 * of.update_ms(8),
        (ADVISE,),
    ),
    Sentence(
        README,
        "a batch that grows to that size closes {closed:.0f}% of the gap to a small batch. Warmup, cosine decay, LARS and LAMB show no gain there, "
        "and the linear rule harms.",
        lambda: {"closed": of.closed("digits", "growth")},
        lambda: (
            of.kinds("digits", "growth") == {"helps"}
            and of.kinds("digits", "warmup", "cosine", "lars", "lamb") == {"nothing"}
            and of.kinds("digits", "linear rule") == {"harms"}
        ),
        ("large_batch/digits",),
    ),
    Sentence(
        README,
        "Brackets hold 95% intervals over {digits} seeds; finding 2 rests on {sweep}.",
        lambda: {"digits": of.seeds(SPLIT_DIGITS), "sweep": of.seeds(CRITICAL)},
        lambda: of.seeds("large_batch/digits") == of.seeds(SPLIT_DIGITS),
        (SPLIT_DIGITS, CRITICAL, "large_batch/digits"),
    ),
]

ON_SPLIT = [
    Sentence(
        SPLIT,
        "after one batch the two differ by at most {distance:.5f} of the step, which is rounding.",
        lambda: {"distance": of.split_distance("mnist_no_momentum")},
        lambda: of.split_distance("mnist_no_momentum") < 1e-3,
        (SPLIT_PLAIN,),
    ),
    Sentence(
        SPLIT,
        "Compared with one update per batch at *its* best rate, it needs {ratio:.2f} times the examples on the digits.",
        lambda: {"ratio": of.split_ratio("digits", "one")},
        lambda: of.split_standing("digits", "one") != "better" and of.split_ends_alike("digits"),
        (SPLIT_DIGITS,),
    ),
    Sentence(
        SPLIT,
        "On MNIST it needs {ratio:.2f} times in the runs that reach the target; one run of five does not.",
        lambda: {"ratio": of.split_ratio("mnist", "one")},
        lambda: of.split_misses("mnist") == 1 and of.split_ends_alike("mnist") and of.seeds(SPLIT_MNIST) == 5,
        (SPLIT_MNIST,),
    ),
    Sentence(
        SPLIT,
        "once each is tuned:** {ratio:.2f} times fewer examples on the digits",
        lambda: {"ratio": of.split_ratio("digits", "small")},
        lambda: of.split_standing("digits", "small") == "worse",
        (SPLIT_DIGITS,),
    ),
    Sentence(
        SPLIT,
        "fewer examples on the digits, {ratio:.2f} times on MNIST.",
        lambda: {"ratio": of.split_ratio("mnist", "small")},
        lambda: of.split_standing("mnist", "small") == "worse",
        (SPLIT_MNIST,),
    ),
    Sentence(
        SPLIT,
        "They train at a rate of {small:.3g}, the split's updates only at {low:.2g} to {high:.2g}.",
        lambda: {
            "small": of.split_rate("digits", "small"),
            "low": min(of.split_rate(name, "split") for name in ("digits", "mnist")),
            "high": max(of.split_rate(name, "split") for name in ("digits", "mnist")),
        },
        lambda: (
            of.split_rate("digits", "small") == of.split_rate("mnist", "small") > max(of.split_rate(name, "split") for name in ("digits", "mnist"))
        ),
        (SPLIT_DIGITS, SPLIT_MNIST),
    ),
    Sentence(
        SPLIT,
        "one run of (c) on MNIST stays at the accuracy of a guess, {worst:.0f}%.",
        lambda: {"worst": of.worst_at_one_rate("mnist", "scaled")},
        lambda: of.lost_at_one_rate("mnist", "scaled") == 1 and of.worst_at_one_rate("mnist", "scaled") < 12,
        (SPLIT_MNIST,),
    ),
    Sentence(
        SPLIT,
        "K ordinary small batches cost more for each batch, {cost:.2f} times the split on MNIST, but need a quarter of the examples.",
        lambda: {"cost": of.small_against_split("mnist")},
        lambda: of.small_against_split("mnist").low > 1 and within(3.3, of.split_ratio("mnist", "small").value, 5),
        (SPLIT_MNIST,),
    ),
    Sentence(
        SPLIT,
        "(60 examples here; at 16 the split costs {cost:.1f}).",
        lambda: {"cost": of.split_cost("digits", "split").value},
        lambda: of.split_cost("digits", "split").value > 1.1,
        (SPLIT_DIGITS,),
    ),
    Sentence(
        SPLIT,
        "for about the price of one step, if a group is large",
        dict,
        lambda: within(0.8, of.split_cost("mnist", "split").value, 1.2),
        (SPLIT_MNIST,),
    ),
]

ON_MNIST = [
    Sentence(
        GRID,
        "The best rate goes from {b1:.3g} (B = 1) over {b60:.3g} (60) to {b600:.3g} (600). Tuned, every size up to 600 reaches 98% "
        "in the runs of the grid",
        of.best_rates,
        lambda: of.rates_stop_growing() and all(map(of.grid_reaches, (1, 6, 60, 600))),
        (RATES,),
    ),
    Sentence(
        GRID,
        "p = {p6:.2f}, {p60:.2f}, {p600:.2f}, {p6000:.2f} from size to size",
        of.exponents,
        lambda: of.exponents()["p6000"] <= 0 < of.exponents()["p6"],
        (RATES,),
    ),
    Sentence(
        GRID,
        "The best rate grows as B^p with p = {p:.2f} over the five sizes; from each size to the next p is {p6:.2f}, "
        "{p60:.2f}, {p600:.2f}, {p6000:.2f}.",
        lambda: {"p": of.grid_exponent(), **of.exponents()},
        lambda: of.grid_exponent().n == 5,
        (RATES,),
    ),
    Sentence(
        GRID,
        "from B = 60 to 600 the updates fall {fewer:.1f}-fold while the examples grow {more:.1f}-fold",
        lambda: {
            "fewer": of.grid_updates(60).value / of.grid_updates(600).value,
            "more": 10 * of.grid_updates(600).value / of.grid_updates(60).value,
        },
        lambda: of.grid_updates(60).value > of.grid_updates(600).value,
        (RATES,),
    ),
    Sentence(
        GRID,
        "At rate 0.02 only these two reach it within 15 epochs, in {six:.1f} and {sixty:.1f} epochs",
        lambda: {"six": of.epochs_at_one_rate(6), "sixty": of.epochs_at_one_rate(60)},
        lambda: of.reaching_sizes("same") == [6, 60],
        (CONVERGENCE,),
    ),
    Sentence(
        GRID,
        "the fit says little: B_crit = {critical:,.0f}.",
        lambda: {"critical": of.critical_on_mnist()},
        lambda: len(of.reaching_sizes("tuned")) == 3 and of.critical_on_mnist().high > 4 * of.critical_on_mnist().value,
        (CONVERGENCE,),
    ),
    Sentence(
        GRID,
        "It is {from0:.0f} examples below 90% validation accuracy, {from90:.0f} from 90 to 95%, {from95:.0f} to 97%, {from97:.0f} above.",
        of.noise_on_mnist,
        lambda: of.noise_on_mnist()["from0"].value < of.noise_on_mnist()["from97"].value,
        (CONVERGENCE,),
    ),
]

SENTENCES = [*ON_README, *ON_SPLIT, *ON_MNIST, *ON_HUGE, *ON_NEGATIVE, *ON_CRITICAL, *ON_ADVICE]
