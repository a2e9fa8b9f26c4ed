"""What can be wrong with a catalogue or its index. Every message says what to do about it."""


class RecallError(Exception):
    """Base of the errors below; the message is meant for a user as it is."""


class InputError(RecallError):
    """A catalogue that can't be indexed; names the file and, for a row, the line."""


class BuildError(RecallError):
    """An index that can't be written: folder in use, disk full, not ours to replace."""


class OpenError(RecallError):
    """An index that can't be served: missing, damaged or built by another version."""
