"""Errors that a user can act on: the commands print them as one line and exit with code 2."""

import torch


class OnpError(Exception):
    """Base of every error that names a bad input, what was expected and what to do."""


class ConfigError(OnpError):
    """An option or a combination of options makes no sense."""


class CheckpointError(OnpError):
    """A checkpoint cannot be read or does not fit the network."""


class MisfitError(CheckpointError):
    """A checkpoint can be read, but is of another network."""


class ModelError(OnpError):
    """A network cannot be built, traced or pruned."""


class DataError(OnpError):
    """Images, labels or a trigger specification cannot be used."""


class MaskError(OnpError):
    """A keep mask does not fit the network or its pruning rule."""


class FileError(OnpError):
    """A file of ours is damaged or missing."""


def lacks_memory(error: BaseException) -> bool:
    """Whether memory did not suffice. PyTorch's allocator on the CPU has no error of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
