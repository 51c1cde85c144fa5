"""What the lab raises when it is asked for something it cannot do."""


class LabError(ValueError):
    """A request the lab cannot serve. The message is one line, meant for the person who asked."""
