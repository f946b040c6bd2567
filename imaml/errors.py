"""The one kind of error that a person can mend: the command line prints its sentence and exits with 2."""


class InputError(ValueError):
    """Something typed, configured or handed in cannot be used; the message says what, and what to do."""
