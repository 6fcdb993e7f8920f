"""Which settings of the losses go together: a setting that a loss would leave unread is refused."""

import inspect

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.losses.preference_loss import (
    LOSSES,
    NEED_MARGINS,
    NEED_SEVERAL,
    RANKED,
    REFERENCE_FREE,
    UNPAIRED,
    is_unpaired,
    options_of,
    takes_divergence,
)
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.shards import UNPAIRED as UNPAIRED_ROWS

_EXAMPLES = {"label_smoothing": "0.001", "rdpo_alpha": "0.01"}
"""Of options without a default; exo_pair's is its paper's."""
_WITHOUT_RANKS = {"aot": "sigmoid", "aot_unpaired": "apo_zero"}
"""The nearest loss that looks at each pair by itself."""
_OF_PAIRS = {"kto": "kto_pair", "apo_zero_unpaired": "apo_zero"}
"""The loss of pairs that is nearest to one of unpaired rows."""


def reads_margins(config: TrainConfig) -> bool:
    """Whether a loss of the configuration reads the data's margins."""
    return not NEED_MARGINS.isdisjoint(config.loss_type)


def require_usable_losses(config: TrainConfig) -> None:
    """Check the losses and their options against each other.

    Raises:
        ConfigError: An option would be ignored, one is missing, or losses and weights do not match.
    """
    names: list[str] = list(config.loss_type)
    _require_weights(config, names)
    _require_known_options(config, names)
    for name in names:
        for option, default in options_of(name).items():
            if default is inspect.Parameter.empty and option not in config.loss_options:
                raise ConfigError(
                    f"--loss-type {name} needs {_flag(option)}",
                    why="its value without one is infinite"
                    if option == "label_smoothing"
                    else "no value of it suits most data",
                    fix=f"add {_flag(option)}, such as {_flag(option)} {_EXAMPLES[option]}",
                )
    _require_divergence(config, names)
    _require_pairs(config, names)
    if config.reference_differs and REFERENCE_FREE.issuperset(names):
        raise ConfigError(
            f"--reference-differs says nothing to --loss-type {' '.join(names)}, which reads no reference",
            why="nothing would hold the policy to the shards' model, and its rewards would not begin at 0",
            fix="leave --reference-differs out; a --model that did not score the shards scores its own with "
            "dpo-opt precompute",
        )


def require_matching_rows(config: TrainConfig, *, rows: str | None, where: str) -> None:
    """Check the losses against what a folder's rows are.

    Args:
        config: The run's settings.
        rows: What the folder's fingerprint says of them.
        where: The folder.

    Raises:
        ConfigError: The losses are of pairs and the rows have one completion each, or the other way round.
    """
    wanted, found = is_unpaired(config.loss_type), rows == UNPAIRED_ROWS
    if wanted == found:
        return
    if found:
        raise ConfigError(
            f"--loss-type {' '.join(config.loss_type)} compares two completions of a prompt, and the rows of "
            "the folder have one and a label",
            where=where,
            why="the other completion that is stored beside it answers another prompt",
            fix="pass --loss-type kto",
        )
    raise ConfigError(
        f"--loss-type {config.loss_type[0]} learns from single completions with a label, and the folder has "
        "pairs",
        where=where,
        why="such a run also needs the reference's log-probs of each prompt with a completion of another",
        fix=f"pass --loss-type {_OF_PAIRS[config.loss_type[0]]}, or make two rows of each pair, "
        "dpo-opt convert DATA --to unpaired --output DIR, and score these",
    )


def require_no_weights(config: TrainConfig, *, weighted: bool, where: str) -> None:
    """Check the losses against the weights of the data.

    Args:
        config: The run's settings.
        weighted: Whether the pairs have weights.
        where: The folder of the pairs.

    Raises:
        ConfigError: A loss has no term of a single pair that a weight could belong to.
    """
    ranked = [name for name in config.loss_type if name in RANKED]
    if weighted and ranked:
        raise ConfigError(
            f"--loss-type {ranked[0]} cannot weigh pairs, and the pairs have weights",
            where=where,
            why="it compares ranks among all pairs of a step, so a term belongs to no one pair",
            fix=f"pass another loss, such as --loss-type {_WITHOUT_RANKS[ranked[0]]}",
        )


def _require_pairs(config: TrainConfig, names: list[str]) -> None:
    """What weighs tokens or pairs, or needs several of them, must find them in the losses."""
    _require_unpaired(config, names)
    ranked = [name for name in names if name in RANKED]
    if config.use_weighting and ranked:
        raise ConfigError(
            f"--use-weighting does not go with --loss-type {ranked[0]}",
            why="it compares ranks among all pairs of a step, so a term belongs to no one pair",
            fix=f"leave --use-weighting out, or pass --loss-type {_WITHOUT_RANKS[ranked[0]]}",
        )
    free = [name for name in names if name in REFERENCE_FREE]
    if config.ld_alpha is not None and free:
        raise ConfigError(
            f"--ld-alpha does not go with --loss-type {free[0]}",
            why="LD-DPO weighs the tokens of log-ratios, and this loss has none",
            fix=f"leave --ld-alpha out, or take {free[0]} out of --loss-type"
            if len(names) > len(free)
            else "leave --ld-alpha out, or pass --loss-type sigmoid",
        )
    several = [name for name in names if name in NEED_SEVERAL]
    if config.batch_size == 1 and several:
        raise ConfigError(
            f"--loss-type {several[0]} compares the pairs of a step, and --batch-size 1 has one",
            why="the pair would be compared with itself",
            fix="pass a larger --batch-size; memory depends on --micro-batch-tokens only",
        )


def _require_unpaired(config: TrainConfig, names: list[str]) -> None:
    """A loss of single completions stands alone, and nothing that compares two goes with it."""
    single = [name for name in names if name in UNPAIRED]
    if not single:
        return
    name, others = single[0], [name for name in names if name not in UNPAIRED]
    if others:
        raise ConfigError(
            f"--loss-type {name} does not go with {others[0]}",
            why=f"{name} is of rows with one completion and a label, {others[0]} of pairs",
            fix=f"pass --loss-type {name} alone",
        )
    for given, flag in (
        (config.ld_alpha is not None, "--ld-alpha"),
        (config.use_weighting, "--use-weighting"),
    ):
        if given:
            raise ConfigError(
                f"{flag} does not go with --loss-type {name}",
                why="it is made of both completions of a pair, and a row has one",
                fix=f"leave {flag} out",
            )
    if config.batch_size == 1 and name in NEED_SEVERAL:
        raise ConfigError(
            f"--loss-type {name} estimates a KL divergence from the rows of a step, and --batch-size 1 has "
            "one",
            why="rewards would be measured from a single log-ratio",
            fix="pass a larger --batch-size; memory depends on --micro-batch-tokens only",
        )


def _require_weights(config: TrainConfig, names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"--loss-type names {twice[0]} twice",
            why="one of them may be a misspelt other loss",
            fix=f"name {twice[0]} once, and say how much it counts with --loss-weights",
        )
    if config.loss_weights is not None and len(config.loss_weights) != len(names):
        raise ConfigError(
            f"--loss-weights has {len(config.loss_weights)} and --loss-type {len(names)}: {' '.join(names)}",
            why="nothing says which weight belongs to which loss",
            fix=f"pass {len(names)}, such as --loss-weights {' '.join(['1'] * len(names))}",
        )


def _require_known_options(config: TrainConfig, names: list[str]) -> None:
    """Every option that is given must be one of the losses'; those of the divergence are checked apart."""
    of_losses = [option for option in config.loss_options if not option.startswith("f_")]
    for option in of_losses:
        if any(option in options_of(name) for name in names):
            continue
        takers = [name for name in LOSSES if option in options_of(name)]
        others = _instead(takers, names)
        raise ConfigError(
            f"{_flag(option)} belongs to {_listed(takers)}, not to {_listed(names)}",
            why="it would be ignored",
            fix=f"leave {_flag(option)} out" + (f", or pass --loss-type {others[0]}" if others else ""),
        )


def _require_divergence(config: TrainConfig, names: list[str]) -> None:
    kind = config.f_divergence_type or "reverse_kl"
    if config.f_alpha_divergence_coef is not None and kind != "alpha_divergence":
        raise ConfigError(
            f"--f-alpha-divergence-coef belongs to alpha_divergence, not to {kind}",
            why="it would be ignored",
            fix="add --f-divergence-type alpha_divergence, or leave --f-alpha-divergence-coef out",
        )
    if kind == "reverse_kl":
        return
    others = [name for name in names if not takes_divergence(name) and name not in REFERENCE_FREE]
    if others or REFERENCE_FREE.issuperset(names):
        takers = _instead([name for name in LOSSES if takes_divergence(name)], names)
        raise ConfigError(
            f"--f-divergence-type {kind} does not go with --loss-type {' '.join(others or names)}",
            why="a term that depends on the prompt cancels only in the difference of both completions"
            if others
            else "it reads no reference, so no divergence from one",
            fix="leave --f-divergence-type out" + (f", or take of {', '.join(takers)}" if takers else ""),
        )


def _instead(losses: list[str], names: list[str]) -> list[str]:
    """Those of ``losses`` to try instead: whoever chose a loss of unpaired rows has such rows."""
    return [name for name in losses if name in UNPAIRED or not is_unpaired(names)]


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
