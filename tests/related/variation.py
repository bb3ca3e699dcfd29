"""What the ten variations share: options, when codes are made, which lists lie in the run.

letters  U users
"""
import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import script

__all__ = ["makes_codes", "only_seed", "own_options", "recalls", "script"]


def own_options(argv, about, variants, **more):
    """The options of a variation, taken off the command line. --help shows them and `about`.

    about: its docstring; variants: what each of them is, by name; more: other options, by name
    -> the variant, the command line that is left for the script (with a --name), what `more` got
    """
    rows = [f"  {name:20}{what}" for name, what in variants.items()]
    parser = argparse.ArgumentParser(
        description="\n".join([about, "variants, of which the first one is the default:", *rows]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options of this file] [options of the script]",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--variant", choices=variants, default=next(iter(variants)))
    for name, what in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=what)
    given, rest = parser.parse_known_args(argv)
    if not {"-h", "--help"}.isdisjoint(rest):
        parser.print_help()
        print("\nAnd those of the script, which are:\n")  # it prints them when it reads this line
    return given.variant, ["--name", given.variant, *rest], *[getattr(given, name) for name in more]


def makes_codes(args):
    """Are codes made before 05 is called? Not for --history, which asks a model that has its codes.

    Of several processes the first one makes them: the others go on to where 05 has all of them
    meet, and no file is read before that.
    """
    return args.history is None and int(os.environ.get("RANK", 0)) == 0


def only_seed(args):
    """What a file of codes says of its options. With all of them --fresh or --device would make
    another file of the same codes, and 05 goes on with no training that began with another file.
    """
    return argparse.Namespace(seed=args.seed)


def recalls(names, groups, data, args):
    """Recall@10 of groups of users, in the lists of those of these models that lie in the run.

    groups: bool (U,), by name -> for each model a sentence, and its first ten items (U, 10)
    """
    target = data["events"][data["offsets"][1:] - 1]                    # (U,)
    for name in dict.fromkeys(names):  # each once
        path = Path(args.run) / f"predictions-{name}-s{args.seed}.pt"
        if path.exists():
            top = torch.load(path, weights_only=True)["test"][:, :10].long()  # (U, 10)
            hit = (top == target.unsqueeze(1)).any(1).float()           # (U,)
            told = [f"{hit[own].mean():.4f} of {group}" for group, own in groups.items()]
            yield f"{name}: Recall@10 " + ", ".join(told), top
