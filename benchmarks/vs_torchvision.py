"""This FCOS against torchvision's, trained for the same minutes by the same engine; box AP on held-out pictures.

    python benchmarks/vs_torchvision.py --data DIR --minutes 4 --folds 5 --out runs/nuts
    python benchmarks/vs_torchvision.py --data DIR --minutes 20 --categories person --search-minutes 5 --out runs/person
    python benchmarks/vs_torchvision.py --smoke --out runs/smoke

Both have the same ImageNet backbone weights, pyramid width, tower depth, batches (sizes, augmentation, order),
optimizer, warm-up, schedule over minutes, clipping and precision, and are scored by the same metric. Each trains at
the best of three learning rates, picked on one fold: fold 0 with --folds, else a fold of the training pictures, or
with --rates a fold of an earlier contest.
"""

from __future__ import annotations

import argparse
import math
import sys

from contest import Contest, Entrant, Outcome, Part, add_common_arguments, best_rates, contest_from
from folds import Split, cross_validation, own_split
from paired import bootstrap_error, mean_and_error
from perpixel.data.synthetic import write_synthetic
from perpixel.recipe import load_recipe
from provenance import RESULTS, table, write_section

RATES = (5e-4, 1e-3, 2e-3)
SEARCH_FOLDS = 5  # of the training pictures, where there is no cross-validation
SMOKE_SETTINGS = [
    "backbone.weights=none", "pyramid.channels=64", "head.cls_convs=1", "head.box_convs=1", "data.short_side=[128]",
    "data.max_size=128", "data.test_short_side=128", "data.test_max_size=128", "data.workers=0", "train.batch_size=2",
    "train.precision=fp32",
]  # fmt: skip


def main() -> None:
    arguments = parse()
    if arguments.smoke:
        make_smoke(arguments)
    theirs = "torchvision, our backbone" if arguments.our_backbone else "torchvision"
    entrants = [Entrant("perpixel", "perpixel"), Entrant(theirs, theirs)]
    contest = contest_from(arguments)
    splits, search = make_splits(arguments)
    search_minutes = arguments.search_minutes or arguments.minutes
    if arguments.rates:
        rates, choice = arguments.rates, given_rates(entrants, arguments.rates)
    else:
        rates, searched = best_rates(contest, entrants, search, arguments.lrs, search_minutes)
        choice = rates_table(arguments, entrants, searched, rates, search, search_minutes)
    groups = [
        [Part(entrant, split, rate, arguments.minutes, seed) for entrant, rate in zip(entrants, rates, strict=True)]
        for seed in range(arguments.seeds)
        for split in splits
    ]
    outcomes = contest.in_turn(groups)
    title = f"Against torchvision: {arguments.title or arguments.data.name}"
    body = "\n\n".join(
        [
            conditions(arguments, contest, splits),
            choice,
            outcomes_table(groups, outcomes),
            verdict(groups, outcomes),
        ]
    )
    print(f"\n## {title}\n\n{body}")
    write_section(title, body, arguments.out / "report.md")
    if not arguments.smoke:
        write_section(title, body, RESULTS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--lrs", type=float, nargs="+", default=list(RATES), help="learning rates to choose from")
    parser.add_argument("--rates", type=float, nargs=2, help="ours and theirs, picked in another contest; no search")
    parser.add_argument("--search-minutes", type=float, help="of the parts that choose the rate; default: --minutes")
    parser.add_argument("--our-backbone", action="store_true", help="give torchvision this project's backbone module")
    parser.add_argument("--title", help="of the section in RESULTS.md; default: the folder's name")
    parser.add_argument("--smoke", action="store_true", help="a few seconds on drawn pictures, to see that all works")
    if "--smoke" in sys.argv:
        for action in parser._actions:
            action.required = action.dest == "out"
    return parser.parse_args()


def make_smoke(arguments: argparse.Namespace) -> None:
    """Options of a run of seconds on a synthetic set."""
    arguments.data = arguments.out / "pictures"
    if not arguments.data.is_dir():
        write_synthetic(arguments.data, train=4, val=2, size=128)
    arguments.minutes, arguments.folds, arguments.lrs = 0.02, 2, arguments.lrs[:1]
    arguments.set, arguments.threads = [*SMOKE_SETTINGS, *arguments.set], 1


def make_splits(arguments: argparse.Namespace) -> tuple[list[Split], Split]:
    """Splits to compare on, and the one that chooses learning rates."""
    out, categories = arguments.out / "splits", arguments.categories
    if arguments.folds:
        splits = cross_validation(arguments.data, out, arguments.folds, categories)
        return splits, splits[0]
    inner = cross_validation(arguments.data, out, SEARCH_FOLDS, categories, parts=["train"])
    return [own_split(arguments.data, out, categories)], inner[0]


# The report


def conditions(arguments: argparse.Namespace, contest: Contest, splits: list[Split]) -> str:
    recipe = load_recipe(contest.recipe, contest.overrides)
    pictures, objects = sum(s.pictures for s in splits), sum(s.objects for s in splits)
    held_out = f"{pictures} held-out pictures with {objects} objects" + (f" in {len(splits)} folds" * bool(splits[1:]))
    changes = f" with {' '.join(contest.overrides)}" if contest.overrides else ""
    return (
        f"Recipe `{contest.recipe}`{changes}; {arguments.minutes:g} minutes a run; {held_out}"
        f"{'; only ' + ', '.join(arguments.categories) if arguments.categories else ''}. Precision "
        f"{recipe.train.precision}, batch {recipe.train.batch_size}, short side {list(recipe.data.short_side)} px, "
        f"{recipe.train.optimizer}, {recipe.train.schedule} schedule, {contest.threads} threads, seeds 0 to "
        f"{arguments.seeds - 1}."
    )


def rates_table(
    arguments: argparse.Namespace,
    entrants: list[Entrant],
    searched: list[list[float]],
    chosen: list[float],
    split: Split,
    minutes: float,
) -> str:
    rows = [[f"{rate:g}", *(f"{ap:.3f}" for ap in aps)] for rate, aps in zip(arguments.lrs, searched, strict=True)]
    where = split.name if arguments.folds else f"a fifth of the training pictures ({split.pictures})"
    picked = ", ".join(f"{e.name} {rate:g}" for e, rate in zip(entrants, chosen, strict=True))
    head = ["learning rate", *(entrant.name for entrant in entrants)]
    return f"Learning rates: box AP on {where} after {minutes:g} minutes.\n\n{table(head, rows)}\n\nChosen: {picked}."


def given_rates(entrants: list[Entrant], rates: list[float]) -> str:
    given = ", ".join(f"{entrant.name} {rate:g}" for entrant, rate in zip(entrants, rates, strict=True))
    return f"Learning rates, each the best of three on one fold of another contest: {given}."


def outcomes_table(groups: list[list[Part]], outcomes: list[list[Outcome]]) -> str:
    names = [part.entrant.name for part in groups[0]]
    head = ["split", *(f"{n} AP" for n in names), "difference", *(f"{n} AP50" for n in names)]
    head += [*(f"{n} steps" for n in names), "other CPUs"]
    rows = [
        [
            f"{group[0].split.name}, seed {group[0].seed}",
            *(f"{o.ap:.3f}" for o in found),
            f"{found[0].ap - found[1].ap:+.3f}",
            *(f"{o.ap50:.3f}" for o in found),
            *(str(o.steps) for o in found),
            " / ".join(f"{o.other_cpus:.2f}" for o in found),
        ]
        for group, found in zip(groups, outcomes, strict=True)
    ]
    codes = sorted({o.code for found in outcomes for o in found})
    note = f"\n\nParts were made with code {'; '.join(codes)}." if codes else ""
    return table(head, rows) + note


def verdict(groups: list[list[Part]], outcomes: list[list[Outcome]]) -> str:
    """Means, and the paired difference with its standard error."""
    names = [part.entrant.name for part in groups[0]]
    means = [mean_and_error([found[i].ap for found in outcomes])[0] for i in (0, 1)]
    mean, error = mean_and_error([a.ap - b.ap for a, b in outcomes])
    kind = f"over {len(outcomes)} pairs"
    if math.isnan(error):
        first, second = outcomes[0]
        error = bootstrap_error(groups[0][0].split.val, first.detections, second.detections)
        kind = "bootstrap over the held-out pictures; says nothing about other seeds"
    return (
        f"**Box AP: {names[0]} {means[0]:.3f}, {names[1]} {means[1]:.3f}; difference {mean:+.3f} ± {error:.3f}** "
        f"(standard error, {kind})."
    )


if __name__ == "__main__":
    main()
