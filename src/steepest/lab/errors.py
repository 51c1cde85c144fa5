"""The exception for requests that the lab cannot serve."""


class LabError(ValueError):
    """An invalid request. The message is one line, written for the user."""
