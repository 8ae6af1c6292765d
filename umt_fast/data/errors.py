"""What is wrong with data, as one type all the way up."""


class DataError(ValueError):
    """A list, manifest or data folder that cannot be used; the message names file, line and remedy."""
