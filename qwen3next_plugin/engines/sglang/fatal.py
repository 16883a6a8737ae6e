"""Errors after which a server must not go on."""


class FatalError(RuntimeError):
    """It ends the server, where another error would be answered."""
