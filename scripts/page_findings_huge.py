"""The sentences about huge batches, the critical batch size and the score of advice, likewise."""

from scripts import kept_numbers as of
from scripts.page_sentences import Sentence

HUGE, NEGATIVE, CRITICAL, ADVICE = (f"docs/{name}.md" for name in ("large_batch", "negative_results", "critical_batch_size", "advice"))
DIGITS, MNIST = "large_batch/digits", "large_batch/mnist"
SCHEDULES = ("warmup", "cyclic", "step decay", "cosine")

ON_HUGE = [
    Sentence(
        HUGE,
        "Plain training ends {gap:.1f} points below the small batch. Its training loss is {training:.2f} higher, and its loss rises *less* "
        "from training to test than the small batch's, by {rise:.2f}.",
        lambda: {
            "gap": -of.gap("digits", "plain").value,
            "training": of.loss_parts("digits", "plain").optimization.value,
            "rise": -of.loss_parts("digits", "plain").generalization.value,
        },
        lambda: of.gap("digits", "plain").high < 0 < of.loss_parts("digits", "plain").optimization.low,
        (DIGITS,),
    ),
    Sentence(
        HUGE,
        "the growing batch closes all of it ({closed:.0f}%), with {more:.1f} times the updates of plain training.",
        lambda: {"closed": of.closed("digits", "growth"), "more": of.times_the_updates("digits", "growth")},
        lambda: of.kinds("digits", "growth") == {"helps"} and of.closed("digits", "growth").high >= 100,
        (DIGITS,),
    ),
    Sentence(
        HUGE,
        "- **25 times the epochs close it too** ({closed:.0f}%), for 25 times the examples. It fits the training data slightly better than the small "
        "batch, and generalizes slightly worse ({worse:+.2f}).",
        lambda: {"closed": of.closed("digits", "longer"), "worse": of.loss_parts("digits", "longer").generalization.value},
        lambda: of.kinds("digits", "longer") == {"helps"} and of.loss_parts("digits", "longer").optimization.high < 0,
        (DIGITS,),
    ),
    Sentence(
        HUGE,
        "Plain's interval is wide (±{half:.1f} points), because its rate, {rate:.3g}, is near the highest that works",
        lambda: {"half": of.half_width(of.accuracy_of("digits", "plain")), "rate": of.arm_rate("digits", "plain")},
        lambda: of.kinds("digits", *SCHEDULES, "lars", "lamb", "split") == {"nothing"},
        (DIGITS,),
    ),
    Sentence(
        HUGE,
        "With κ = 25 the linear rule gives {rate:.2f}, where training collapses; its warmup does not save it. The best tuned rate is {times:.0f} "
        "times the small batch's.",
        lambda: {
            "rate": of.arm_rate("digits", "linear rule"),
            "times": of.arm_rate("digits", "plain") / of.arm_rate("digits", "small"),
        },
        lambda: (
            of.kinds("digits", "linear rule", "linear rule, warmup") <= {"harms", "lost"} and of.kinds("digits", "square-root rule") == {"nothing"}
        ),
        (DIGITS,),
    ),
    Sentence(
        HUGE,
        "- **The noise of the small batch harms** ({gain:.1f} points against plain).",
        lambda: {"gain": of.gain("digits", "noise")},
        lambda: of.kinds("digits", "noise") == {"harms"},
        (DIGITS,),
    ),
    Sentence(
        HUGE,
        "Four times the epochs close {closed:.0f}%. Split updates harm here",
        lambda: {"closed": of.closed("mnist", "longer").value},
        lambda: of.kinds("mnist", "split", "noise", "linear rule") <= {"harms", "lost"} and of.closed("mnist", "growth").high >= 100,
        (MNIST,),
    ),
    Sentence(
        HUGE,
        "LARS closes {lars:.0f}% and LAMB {lamb:.0f}% of the gap. Plain's interval is ±{plain:.1f} points here, so such differences show; LARS's is "
        "±{wide:.1f}. LARS with growth is {above:.2f} points above the small batch, and has the lower training loss.",
        lambda: {
            "lars": of.closed("mnist", "lars").value,
            "lamb": of.closed("mnist", "lamb").value,
            "plain": of.half_width(of.accuracy_of("mnist", "plain")),
            "wide": of.half_width(of.accuracy_of("mnist", "lars")),
            "above": of.gap("mnist", "lars + growth"),
        },
        lambda: of.kinds("mnist", "lars", "lamb") == {"helps"} and of.loss_parts("mnist", "lars + growth").optimization.high < 0,
        (MNIST,),
    ),
    Sentence(
        HUGE,
        "- **A rate that falls harms** (step decay {step:.1f}, cosine {cosine:.1f} points):",
        lambda: {"step": of.gain("mnist", "step decay").value, "cosine": of.gain("mnist", "cosine").value},
        lambda: of.kinds("mnist", "step decay", "cosine") == {"harms"},
        (MNIST,),
    ),
    Sentence(
        HUGE,
        "- **Warmup gains {gain:.1f} points.** The square-root rule, with κ = 100, names exactly the rate that tuning finds.",
        lambda: {"gain": of.gain("mnist", "warmup").value},
        lambda: of.kinds("mnist", "warmup") == {"helps"} and abs(of.arm_rate("mnist", "square-root rule") / of.arm_rate("mnist", "plain") - 1) < 0.01,
        (MNIST,),
    ),
]

ON_NEGATIVE = [
    Sentence(
        NEGATIVE,
        "digits: none shows a difference to a tuned constant rate (±{half:.1f} points).",
        lambda: {"half": of.half_width(of.accuracy_of("digits", "plain"))},
        lambda: of.kinds("digits", *SCHEDULES, "lars", "lamb", "split") == {"nothing"},
        (DIGITS,),
    ),
    Sentence(
        NEGATIVE,
        "MNIST at B = 6,000: LARS closes {lars:.0f}% of the gap, LAMB {lamb:.0f}%, warmup {warmup:.0f}%; cyclic shows none; "
        "step decay, cosine and split harm",
        lambda: {arm: of.closed("mnist", arm).value for arm in ("lars", "lamb", "warmup")},
        lambda: of.kinds("mnist", "step decay", "cosine", "split") == {"harms"} and of.kinds("mnist", "cyclic") == {"nothing"},
        (MNIST,),
    ),
    Sentence(
        NEGATIVE,
        "{digits:.1f} points worse on the digits, {mnist:.1f} on MNIST",
        lambda: {name: -of.gain(name, "noise").value for name in ("digits", "mnist")},
        lambda: of.kinds("digits", "noise") == of.kinds("mnist", "noise") == {"harms"},
        (DIGITS, MNIST),
    ),
    Sentence(
        NEGATIVE,
        "no gain over one update; {digits:.1f} and {mnist:.1f} times the examples of small batches",
        lambda: {name: of.split_ratio(name, "small").value for name in ("digits", "mnist")},
        lambda: all(of.split_standing(name, "one") != "better" for name in ("digits", "mnist")),
        ("split_backward/digits", "split_backward/mnist"),
    ),
]

ON_CRITICAL = [
    Sentence(
        CRITICAL,
        "The mean of the three thirds is {mean:.0f}, which is what the fit finds",
        lambda: {"mean": of.mean_noise("digits")},
        lambda: not of.critical_ways("digits")[0].critical_batch_size.excludes(of.mean_noise("digits")),
        ("critical_batch_size/digits",),
    ),
]

ON_ADVICE = [
    Sentence(
        ADVICE,
        "the median regret is {median}, the worst {worst}**",
        lambda: of.score("advise"),
        runs=("score",),
    ),
]
