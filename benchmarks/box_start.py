"""Where the box regression starts: distances of 4 strides (the default) against 0 (the authors' release).

    python benchmarks/box_start.py --data DIR --minutes 4 --folds 5 --out runs/box_start

Everything else is the same, the learning rate included.
"""

from __future__ import annotations

import argparse

from contest import Entrant, Part, add_common_arguments, contest_from
from folds import cross_validation, own_split
from perpixel.recipe import load_recipe
from provenance import RESULTS, write_section
from vs_torchvision import conditions, outcomes_table, verdict

STARTS = (4.0, 0.0)  # strides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--lr", type=float, help="learning rate; default: the recipe's")
    arguments = parser.parse_args()
    contest = contest_from(arguments)
    rate = arguments.lr or load_recipe(arguments.recipe, contest.overrides).train.lr
    entrants = [Entrant(f"start {start:g}", "perpixel", (f"box.start={start}",)) for start in STARTS]
    out = arguments.out / "splits"
    if arguments.folds:
        splits = cross_validation(arguments.data, out, arguments.folds, arguments.categories)
    else:
        splits = [own_split(arguments.data, out, arguments.categories)]
    groups = [
        [Part(entrant, split, rate, arguments.minutes, seed) for entrant in entrants]
        for seed in range(arguments.seeds)
        for split in splits
    ]
    outcomes = contest.in_turn(groups)
    title = f"Where boxes start: {arguments.data.name}"
    settings = f"{conditions(arguments, contest, splits)} Learning rate {rate:g}."
    body = "\n\n".join([settings, outcomes_table(groups, outcomes), verdict(groups, outcomes)])
    print(f"\n## {title}\n\n{body}")
    write_section(title, body, arguments.out / "report.md")
    write_section(title, body, RESULTS)


if __name__ == "__main__":
    main()
