"""The study: its flags, what it measures and in which order. Its question stands in the docstring of the package."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

import jaxbatch as jb
from experiments.harness.command_line import for_quick
from experiments.harness.optimizers import OptimizerFlags, fill_optimizer, make_optimizer
from experiments.harness.study import StudyConfig, check_positive, open_study, run_study
from experiments.nose_game import __doc__ as question
from experiments.nose_game.records import describe_path
from jaxbatch.intervals import interval
from jaxbatch.results import plots
from jaxbatch.results.records import Record, RunFolder
from jaxbatch.results.report import print_table


@dataclasses.dataclass(frozen=True)
class Config(OptimizerFlags, StudyConfig):
    """Flags of the study. It has no data set: the helpers are drawn from the seed."""

    num_helpers: int = 12
    """Number of helpers; asking all of them is the full batch."""
    batch_sizes: tuple[int, ...] = (1, 2, 12)
    """Numbers of helpers that are asked at each step; each is one way to play."""
    num_steps: int = 30
    """Number of steps that the child takes."""
    learning_rate: float = 0.3
    """Share of the called-out correction that the child walks."""
    disagreement: float = 0.35
    """Spread of the places where helpers think the nose belongs; the child starts at a distance of 2.2."""
    seeds: int = 50
    """Number of games; each has its own helpers and its own order of asking."""


def make_helpers(config: Config, seed: int) -> tuple[Float[Array, "N 2"], Float[Array, "N 2 2"]]:
    """Where each helper sees the nose's place, and how clearly: well across its line of sight, badly along it."""
    random = np.random.default_rng(seed)
    seen = config.disagreement * random.normal(size=(config.num_helpers, 2))
    angles = random.uniform(0, np.pi, config.num_helpers)
    along = np.stack([np.cos(angles), np.sin(angles)], -1)
    across = np.stack([-np.sin(angles), np.cos(angles)], -1)
    clarity = across[:, :, None] * across[:, None, :] + 0.15 * along[:, :, None] * along[:, None, :]
    return jnp.asarray(seen, jnp.float32), jnp.asarray(clarity, jnp.float32)


def loss_fn(position: Float[Array, "2"], helpers: tuple[Array, Array]) -> Float[Array, "B"]:
    """Half the squared distance that each helper sees; its negative gradient is the correction that the helper calls out."""
    seen, clarity = helpers
    offset = position[None] - seen
    return 0.5 * jnp.einsum("bi,bij,bj->b", offset, clarity, offset)


def target(helpers: tuple[Array, Array]) -> Float[np.ndarray, "2"]:
    """Where all helpers together would put the nose: the place with the least mean loss."""
    seen, clarity = (np.asarray(part, float) for part in helpers)
    return np.linalg.solve(clarity.sum(0), np.einsum("bij,bj->i", clarity, seen))


START = (-1.8, 1.3)


def play(config: Config, seed: int, batch_size: int) -> Float[np.ndarray, "T 2"]:
    """The child's path, including its start, when it asks ``batch_size`` helpers at each step."""
    helpers = make_helpers(config, seed)
    optimizer = make_optimizer(config)(config.learning_rate)
    step = jb.make_train_step(loss_fn, optimizer, batch_size)
    start = jnp.array(START)
    state = jb.TrainState(start, optimizer.init(start), jnp.zeros((), jnp.int32))
    per_round = config.num_helpers // batch_size
    rounds = -(-config.num_steps // per_round)  # each round asks everyone once, in a new order
    indices = jnp.concatenate([jb.epoch_batches(seed, r, config.num_helpers, batch_size).indices for r in range(rounds)])

    def one_step(state, asked):
        state, _ = step(state, jax.tree.map(lambda leaf: leaf[asked], helpers))
        return state, state.params

    _, path = jax.lax.scan(one_step, state, indices[: config.num_steps])
    return np.concatenate([np.array([START]), np.asarray(path, float)])


def resolve(config: Config) -> Config:
    """Shrinks for --quick, and checks."""
    config = fill_optimizer(for_quick(config, seeds=5))
    check_positive(config, "num_helpers", "num_steps", "learning_rate", "seeds", "batch_sizes")
    if max(config.batch_sizes) > config.num_helpers:
        raise ValueError(f"--batch-sizes {max(config.batch_sizes)} is more than there are helpers ({config.num_helpers}).")
    return dataclasses.replace(config, batch_sizes=tuple(sorted(set(config.batch_sizes))))


def measure(config: Config, run: RunFolder) -> Iterator[Record]:
    """One record a game."""
    for batch_size in config.batch_sizes:
        for seed in range(config.seeds):
            if not run.find(batch_size=batch_size, seed=seed):
                path, helpers = play(config, seed, batch_size), make_helpers(config, seed)
                numbers = describe_path(path, target(helpers))
                asked = numbers["steps_to_near"]
                yield (
                    {"batch_size": batch_size, "seed": seed}
                    | numbers
                    | {
                        "questions": config.num_steps * batch_size,
                        "questions_to_near": None if asked is None else asked * batch_size,
                    }
                )


def name(config: Config, batch_size: int) -> str:
    """The name of a way of asking in tables and figures."""
    return "everyone" if batch_size == config.num_helpers else f"{batch_size} at a time"


def column(records: Sequence[Record], batch_size: int, key: str) -> list[float | None]:
    """The value of ``key`` in every game with one way of asking."""
    return [record[key] for record in sorted(records, key=lambda r: r["seed"]) if record["batch_size"] == batch_size]


def print_tables(console: Console, config: Config, records: Sequence[Record]) -> None:
    """Prints numbers that describe the paths, as means over the games."""
    rows = []
    for size in config.batch_sizes:
        near = column(records, size, "questions_to_near")
        numbers = [f"{interval(column(records, size, key)):.2f}" for key in ("length", "overshoot", "end_distance")]
        reached = sum(value is not None for value in near)
        rows.append([name(config, size), *numbers, f"{interval(near):.0f}", f"{reached}/{len(near)}", f"{config.num_steps * size}"])
    columns = ["asked", "path length", "overshoot", "distance at the end", "questions until near", "came near", "questions in all"]
    title = f"{config.num_steps} steps, mean of {config.seeds} games; near: within 0.25 of where all helpers together point"
    print_table(console, title, columns, rows)


def verdict(config: Config, records: Sequence[Record]) -> list[str]:
    """The sentences that the intervals allow, and no others."""
    if len(config.batch_sizes) < 2:
        return []
    few, many = config.batch_sizes[0], config.batch_sizes[-1]
    sentences = []
    measures = {"length": "path is {:.2f} longer", "overshoot": "overshoot is {:.2f} larger", "end_distance": "end is {:.2f} farther off"}
    for key, what in measures.items():
        differences = np.subtract(column(records, few, key), column(records, many, key))
        more, less = (few, many) if differences.mean() > 0 else (many, few)
        difference = interval(differences if more == few else -differences, scale="linear")
        if difference.excludes(0):
            sentences.append(f"When the child asks {name(config, more)}, its {what.format(difference)} than when it asks {name(config, less)}.")
        else:
            sentences.append(f"No difference in {key.replace('_', ' ')} shows between asking {name(config, few)} and asking {name(config, many)}.")
    asked = [interval(column(records, size, "questions_to_near"), scale="log") for size in (few, many)]
    if all(questions.n for questions in asked):
        sentences.append(
            f"To come near takes {asked[0]:.0f} questions when asking {name(config, few)}, and {asked[1]:.0f} when asking {name(config, many)}."
        )
    return sentences


def draw_figure(config: Config, folder: pathlib.Path) -> pathlib.Path:
    """The paths of the first game, one panel for each way of asking, on the picture."""
    figure, panels = plots.subplots(1, len(config.batch_sizes), figsize=(4.6 * len(config.batch_sizes), 4.6), squeeze=False, sharex=True, sharey=True)
    helpers = make_helpers(config, 0)
    nose, seen = target(helpers), np.asarray(helpers[0])
    turn = np.linspace(0, 2 * np.pi, 200)
    for axes, size, color in zip(panels[0], config.batch_sizes, plots.COLORS * 9):
        for centre, radius in (((0, 0), 2.4), ((-0.8, 0.75), 0.22), ((0.8, 0.75), 0.22)):
            axes.plot(centre[0] + radius * np.cos(turn), centre[1] + radius * np.sin(turn), color="#BBBBBB", lw=1.5, zorder=1)
        smile = np.linspace(1.15 * np.pi, 1.85 * np.pi, 60)
        axes.plot(1.3 * np.cos(smile), 1.3 * np.sin(smile), color="#BBBBBB", lw=1.5, zorder=1)
        axes.plot(*seen.T, "x", color="#888888", ms=5, zorder=2, label="where a helper sees it")
        path = play(config, 0, size)
        axes.plot(*path.T, ".-", color=color, lw=1.5, ms=5, zorder=3, label="the child's path")
        axes.plot(*path[0], "o", color=color, mfc="white", ms=9, zorder=4, label="start")
        axes.plot(*path[-1], "o", color=color, ms=9, zorder=4, label="end")
        axes.plot(*nose, "*", color="black", ms=14, zorder=5, label="where all together point")
        numbers = describe_path(path, nose)
        axes.set(
            title=f"ask {name(config, size)}",
            xlabel=f"path {numbers['length']:.1f}, end {numbers['end_distance']:.2f} away, {config.num_steps * size} questions",
            aspect="equal",
        )
        axes.set_xlim(-2.7, 2.7)
        axes.set_ylim(-2.7, 2.7)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return plots.save(figure, folder)


def study(config: Config, console: Console) -> None:
    """Plays the games that are missing, then shows table, figure and verdict."""
    config = resolve(config)
    run = open_study("nose_game", config, console)
    for record in measure(config, run):
        run.append(record)
    print_tables(console, config, run.records)
    path = draw_figure(config, run.path)
    for sentence in verdict(config, run.records):
        console.print(sentence, style="bold", soft_wrap=True)
    console.print(f"Figure: {path}", soft_wrap=True)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    run_study(Config, question, study, args)


if __name__ == "__main__":
    main()
