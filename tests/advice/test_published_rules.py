"""Published rules against numbers that their papers and authors print, which were not made from the formulas in the code."""

import math

import numpy as np
import pytest

import jaxbatch as jb

AT = {"num_parameters": 124e6, "num_tokens": 2.5e9, "sequence_length": 1024}


def rule(name, **changes):
    (one,) = (rule for rule in jb.published_rules(**AT | changes).rules if rule.name == name)
    return one


@pytest.mark.parametrize("layers, width, batch, rate", [(30, 4096, 2304, 4.2e-4), (95, 8192, 4608, 3.2e-4)])
def test_deepseek_trained_by_its_rule(layers, width, batch, rate):
    """Table 2 of the paper, "based on our findings in Section 3": sequences of 4,096 tokens, 2.0T tokens; FLOPs by its eq. 2."""
    per_token = 72 * layers * width**2 + 12 * layers * width * 4096
    one = rule("DeepSeek LLM", sequence_length=4096, num_tokens=2e12, num_parameters=12 * layers * width**2, compute=2e12 * per_token)
    assert one.batch_sequences == pytest.approx(batch, rel=0.1) and one.learning_rate == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(
    "parameters, tokens, rate, batch",
    [
        (399e6, 8.92e9, 9.503e-4, 96),
        (545e6, 14.04e9, 9.143e-4, 128),
        (822e6, 20.76e9, 8.825e-4, 160),
        (1.1e9, 28.54e9, 8.561e-4, 192),
        (1.5e9, 38.91e9, 8.305e-4, 256),
    ],
)
def test_moonlight_trained_by_its_rule(parameters, tokens, rate, batch):
    """Table 2 of the paper: multiples of 32 sequences of 8K tokens. So its table 9 counts tokens."""
    one = rule("Moonlight", num_parameters=parameters, num_tokens=tokens, sequence_length=8192)
    assert one.batch_sequences == pytest.approx(batch, abs=24) and one.learning_rate == pytest.approx(rate, rel=0.04)
    assert not one.outside


def test_step_law_is_what_its_authors_tool_says():
    """``fit_tool.py pred-opt-lr-bs 3.4193e8 1.7158e8 612`` prints rate 5.05e-4 and 29,252 tokens, 47.8 sequences; the paper rounds its constants."""
    one = rule("Step Law", num_parameters=3.4193e8, num_tokens=1.7158e8, sequence_length=612)
    assert [one.batch_tokens, one.batch_sequences] == pytest.approx([29_252, 47.8], rel=3e-3)
    assert one.learning_rate == pytest.approx(5.05e-4, rel=0.02)
    assert one.outside == {"num_tokens": pytest.approx(0.0858, abs=1e-4)}


def test_power_lines_counts_sequences():
    """At 610M parameters and 20 tokens a parameter the paper's losses are 2.583, 2.570, 2.563, 2.571, 2.625 at these sizes."""
    losses = {63: 2.583, 126: 2.570, 252: 2.563, 504: 2.571, 2016: 2.625}
    batch = rule("Power Lines", num_parameters=610e6, num_tokens=12.2e9, sequence_length=2048).batch_sequences
    assert min(losses, key=lambda size: abs(math.log(size / batch))) == min(losses, key=lambda size: losses[size])


@pytest.mark.parametrize(
    "updates, of_256",  # to the same loss at 256, 512, ..., 8,192 sequences of 512 tokens; the updates at 256 that make 20 tokens a parameter
    [
        ([13_282, 7_000, 3_840, 2_500, 1_800, 1_600], 13_282),
        ([24_000, 11_951, 7_128, 4_200, 2_760, 2_400], 23_438),
        ([46_000, 23_400, 13_300, 7_224, 4_980, 3_400], 46_875),
        ([81_000, 37_440, 21_320, 11_400, 7_199, 4_700], 93_750),
        ([176_000, 94_000, 46_500, 25_000, 15_360, 8_900], 187_500),
    ],
)
def test_zhang_counts_sequences_and_millions_of_tokens(updates, of_256):
    """From the counts of the authors' notebook: the batch that takes 20% more examples than 256 does."""
    sizes = 256.0 * 2 ** np.arange(6)
    overhead = sizes * updates / (256 * updates[0])
    critical = 2 ** np.interp(1.2, np.maximum.accumulate(overhead), np.log2(sizes))
    one = rule("Zhang et al.", num_tokens=of_256 * 256 * 512, sequence_length=512, num_parameters=3e8)
    assert 1 / 1.5 < one.batch_sequences / critical < 1.5 and not one.outside


def test_kaplan():
    """The batch "approximately doubles for every 13% decrease in loss"; the Step Law paper draws the rate of 2.155e9 parameters at 2.404e-4."""
    high, low = (rule("Kaplan et al.", loss=loss).batch_tokens for loss in (3.0, 0.87 * 3.0))
    assert low / high == pytest.approx(2, rel=0.04) and high == pytest.approx(2e8 / 3 ** (1 / 0.21))
    assert rule("Kaplan et al.", num_parameters=2.155e9).learning_rate == pytest.approx(2.404e-4, rel=5e-3)
    assert rule("Kaplan et al.", num_parameters=2e10).learning_rate is None


def test_minicpm_only_with_a_loss():
    assert "MiniCPM" not in [rule.name for rule in jb.published_rules(**AT).rules]
    assert rule("MiniCPM", loss=2.0).batch_tokens == pytest.approx(1.21e9 / 2**6.24)


def test_units_and_disagreement():
    published = jb.published_rules(**AT, loss=3.0)
    for one in published.rules:
        assert one.batch_sequences * AT["sequence_length"] == pytest.approx(one.batch_tokens)
        assert rule(one.name, loss=3.0, sequence_length=4096).batch_tokens == one.batch_tokens  # tokens do not depend on the length
        assert one.kind in published.disagreement and one.source.startswith("arXiv ") and one.fitted
    for kind in ("best", "critical"):
        sizes = sorted(one.batch_tokens for one in published.rules if one.kind == kind)
        assert len(sizes) >= 3 and published.disagreement[kind] == sizes[-1] / sizes[0]
    rates = sorted(one.learning_rate for one in published.rules if one.learning_rate)
    assert published.disagreement["learning_rate"] == rates[-1] / rates[0]


def test_compute_changes_the_rules_of_compute_alone():
    plain, doubled = jb.published_rules(**AT), jb.published_rules(**AT, compute=2 * 6 * 124e6 * 2.5e9)
    ratios = {one.name: two.batch_tokens / one.batch_tokens for one, two in zip(plain.rules, doubled.rules, strict=True)}
    assert ratios.pop("DeepSeek LLM") == pytest.approx(2**0.3271) and ratios.pop("Moonlight") == pytest.approx(2**0.4137915)
    assert set(ratios.values()) == {1.0}


@pytest.mark.parametrize("name", ["num_parameters", "num_tokens", "sequence_length", "compute", "loss"])
@pytest.mark.parametrize("value", [0, -1, 10**400, math.nan, math.inf])
def test_impossible_numbers_are_one_line(name, value):
    if name == "sequence_length" and isinstance(value, float):
        value = -5
    with pytest.raises(ValueError, match=rf"^{name}=\S+ must be above 0, and no more than a training run can have\.$"):
        jb.published_rules(**AT | {name: value})
