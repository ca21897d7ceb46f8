"""The score of advice as a table in Markdown."""

from collections.abc import Sequence

import numpy as np
from advice_promises import print_promises


def print_score(rows: list[dict], others: Sequence[str]) -> None:
    """The rows of all cases as a table in Markdown, and what they come to; ``others``: what people do instead, as far as it was judged."""
    usual = [name for name in others if any(np.isfinite(row[name]) for row in rows)]
    print("| " + " | ".join(["case", "objective", "advised", "sweep's best", "regret", "cost ÷ best", "cost ÷ sweep", "runs", *usual]) + " |")
    print("|" + "---|" * (8 + len(usual)))
    for row in rows:
        (size, rate), (best_size, best_rate) = row["advised"], row["best"]
        name = row["case"] + (" (building)" if row["building"] else "")
        advised = "none" if size is None else f"{size}, {rate:.3g}"
        cells = [name, row["objective"], advised, f"{best_size}, {best_rate:.3g}", f"{row['regret']:.2f}"]
        cells += [
            "–" if np.isnan(row["price"]) else f"{row['price']:.0f}",
            "–" if np.isnan(row["share"]) else f"{row['share']:.3f}",
            str(row["probes"]),
        ]
        print(
            "| "
            + " | ".join([*cells, *("–" if np.isnan(row[name]) else "no" if np.isinf(row[name]) else f"{row[name]:.2f}" for name in usual)])
            + " |"
        )
    scored = [row for row in rows if not row["building"]]
    regrets = {"advise": [row["regret"].value for row in scored]} | {name: [row[name] for row in scored] for name in usual}
    for name, values in regrets.items():
        known = [value for value in values if not np.isnan(value)]  # the best setting of the sweep missed the goal in the others
        if known:
            print(f"{name}: median regret {np.median(known):.2f}, worst {max(known):.2f}, over {len(known)} of {len(values)} scored cases")
    if scored:
        prices = [row["price"] for row in scored if np.isfinite(row["price"])]
        print(f"cost of all runs: {np.median(prices):.0f} runs of the best setting (median), {max(prices):.0f} at most")
    print_promises([row for row in rows if "promise" in row])
