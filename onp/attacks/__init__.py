"""Attacks, for making and judging test models. Nothing on the defending path imports this package."""
