"""`python -m onp`: which commands there are."""

from __future__ import annotations

COMMANDS = {
    "train": "purify a network; without options, a demonstration on handwritten digits",
    "detect": "is it backdoored, towards which class, and which images are triggered?",
    "evaluate": "measure a finished run again, from its files",
    "apply": "apply a mask, and write files that deploy",
    "graph": "draw the unit graph",
    "attacks": "make a backdoored test model",
    "zoo": "make test models by fixed recipes, beside clean twins",
    "bench": "measure all of this on many networks and seeds",
}


def main() -> None:
    """Print a line for every command."""
    print("usage: python -m onp.COMMAND [OPTIONS]; each has a --help\n")
    for name, purpose in COMMANDS.items():
        print(f"  python -m onp.{name:<9} {purpose}")


if __name__ == "__main__":
    main()
