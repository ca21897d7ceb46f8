"""The look of all figures: colour-blind-safe colours, plain axes, PNG and PDF from one drawing."""

import pathlib

# Okabe and Ito's palette, told apart by all common forms of colour blindness, in print too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def subplots(*args, **kwargs):
    """``plt.subplots`` in the common style, drawn without a display."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(*args, **kwargs)


def save(figure, folder: pathlib.Path, name: str = "figure") -> pathlib.Path:
    """Writes ``name.png`` and ``name.pdf`` into ``folder`` and returns the PNG's path."""
    import matplotlib
    from matplotlib import pyplot as plt

    path = folder / f"{name}.png"
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)
        figure.savefig(path.with_suffix(".pdf"))
    plt.close(figure)
    return path
