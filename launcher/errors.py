"""The launcher's own branch of the family in `train.errors`."""

from train.errors import LorapackError


class ClusterError(LorapackError):
    """The cluster refused a command, or answered something that this program does not understand."""
