"""The one exception of this package.

    CheckpointError      a file, or a set of arrays, that the user gave cannot be used as it is

It owns no behaviour. The message is one sentence or two: which file, which tensor or option, what
was found there, what to change. Nothing that a user's file can cause reaches the caller as another
type.
"""


class CheckpointError(Exception):
    """What the user gave cannot be used; the message says where, why and what to change."""
